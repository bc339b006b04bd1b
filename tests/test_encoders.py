"""Adapted and inflated networks equal their parents; encoders by name train, move between tasks and ship; foreign
checkpoints load by matching names."""
import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmed.all import *
from fastmed.core import ArgumentError, FileError, MissingFileError
from fastmed.learn.fast import make_fast
from fastmed.models.adapt import first_convs, grey_scale
from fastmed.models.classifiers import create_encoder_classifier
from fastmed.models.encoders import create_encoder, create_network, is_encoder, thin_axis
from fastmed.models.unet import unet_cicek
from fastmed.models.zoo import model_divisor, param_splitter

# fastcore's own, which pytest would collect
for _n in [n for n in globals() if n.startswith('test')]:
    del globals()[_n]
from phantoms import shaken


def made(name, **kwargs):
    import timm  # noqa: F401
    torch.manual_seed(0)
    return shaken(timm.create_model(name, **kwargs))

def outs(o): return list(o) if isinstance(o, (list,tuple)) else [o]
def apart(a, b): return max(float((p-q).abs().max()/p.abs().max()) for p,q in zip(outs(a), outs(b), strict=True))

# ---- channels

families = dict(resnet10t={}, resnext26ts={}, densenet121={}, efficientnet_b0={}, tf_mobilenetv3_small_075={},
                mobilenetv3_small_050={}, convnext_atto={}, regnety_002={}, hrnet_w18_small={}, repvgg_a0={},
                mobileone_s0={},
                resnetv2_50x1_bit={}, nf_regnet_b0={}, xception41={}, vit_tiny_patch16_224=dict(img_size=64),
                swin_tiny_patch4_window7_224=dict(img_size=64), deit_tiny_patch16_224=dict(img_size=64),
                crossvit_tiny_240={}, ghostnet_050={}, edgenext_xx_small={})

@pytest.mark.parametrize('name', families)
def test_grey_equals_stacked(name):
    dt = torch.float64 if 'bit' in name else torch.float32             # fifty standardised layers let rounding grow
    net = made(name, **families[name]).to(dt)
    n = 240 if 'crossvit' in name else 64
    x = torch.randn(1,1,n,n, dtype=dt)
    with torch.no_grad(): want = net(x.expand(-1,3,-1,-1))
    for n_in in (1,2,5):
        got = adapt_input(deepcopy(net), n_in)
        with torch.no_grad(): assert apart(want, got(x.expand(-1,n_in,-1,-1)))<1e-5, n_in
        assert all((got.get_submodule(k).weight[:,i]!=0).any() for k in first_convs(got) for i in range(n_in))

def test_adapt_keeps_the_rest():
    for conv in (nn.Conv2d(3,4,3,2,1,dilation=2,padding_mode='reflect'), nn.Conv3d(3,4,(3,3,1),bias=False)):
        new = adapt_input(nn.Sequential(deepcopy(conv), nn.ReLU()), 4)[0]
        assert (new.stride,new.padding,new.dilation,new.padding_mode,new.in_channels)==(conv.stride,conv.padding,
                conv.dilation,conv.padding_mode,4)
        if conv.bias is not None: assert torch.equal(new.bias, conv.bias)
        same = adapt_input(deepcopy(conv), 3)
        assert torch.equal(same.weight, conv.weight)
    for net in (UNet(2, 3, ndim=2, nf=4, depth=2), unet_cicek(2, 3)):
        assert adapt_input(net, 1).n_in==1
    with pytest.raises(InputError, match='groups'): adapt_input(nn.Conv2d(4,8,3,groups=2), 1)
    with pytest.raises(InputError, match='positive int'): adapt_input(nn.Conv2d(3,8,3), 0)
    class SpaceToDepth(nn.PixelUnshuffle):
        def __init__(self): super().__init__(4)
    with pytest.raises(InputError, match='rearranges'): adapt_input(nn.Sequential(SpaceToDepth(), nn.Conv2d(48,8,3)), 1)

def test_colours_of_grey():
    net = made('lcnet_050', features_only=True, out_indices=(0,1))
    enc = create_encoder('lcnet_050', 1, 2, as_rgb=True, levels=2)[0].eval()
    enc.net.load_state_dict(net.state_dict())
    z = torch.randn(1,1,32,32)
    photo = (.449+.226*z - torch.tensor([.485,.456,.406]).view(1,3,1,1))/torch.tensor([.229,.224,.225]).view(1,3,1,1)
    with torch.no_grad(): assert apart(net(photo), enc(z))<1e-6

# ---- the third axis

inflatable = dict(resnet10t='average', seresnext26ts='centre', ecaresnet26t='centre', resnest14d='average',
                  convnext_atto='average', convnextv2_atto='centre', regnety_002='average', ghostnet_050='centre',
                  repghostnet_050='average', mobilenetv3_small_050='average',
                  tf_mobilenetv3_small_075='average', nf_regnet_b0='average', hrnet_w18_small='centre',
                  gernet_s='average', inception_next_atto='average', ese_vovnet19b_dw='average', xception41='centre',
                  fasternet_t0='average', tinynet_e='average')

@pytest.mark.parametrize('name', inflatable)
def test_inflated_equals_its_parent(name):
    net = made(name, features_only=True)
    deep = inflate(net, how=inflatable[name], check=False)
    x = torch.randn(1,3,64,64)
    with torch.no_grad(): a,b = net(x),deep(x[...,None].repeat(1,1,1,1,32))
    assert [tuple(o.shape[:4]) for o in b]==[tuple(o.shape) for o in a]
    assert apart([o[...,None] for o in a], b)<1e-5

@pytest.mark.parametrize('axis', [0,1,2])
def test_inflated_along_any_axis(axis):
    net = made('lcnet_050', features_only=True)
    x = torch.randn(1,3,64,48)
    v = x.unsqueeze(axis+2).expand(*x.shape[:axis+2], 12, *x.shape[axis+2:])
    for kw in (dict(strides3=1), dict(strides3=(1,2)), dict(strides3=(1,1,2,2,2), how='centre'),
                                                            dict(strides3=1, kernels3=1)):
        deep = inflate(net, axis=axis, **kw)
        with torch.no_grad(): a,b = net(x),deep(v)
        assert apart([o.unsqueeze(axis+2) for o in a], b)<1e-5
        s = kw['strides3']
        s = (s,)*5 if isinstance(s, int) else (*s,2,2,2,2,2)[:5]
        assert [o.shape[axis+2] for o in b]==[-(-12//int(np.prod(s[:i+1]))) for i in range(5)]
    # a centred network of unstrided slices is the parent, slice by slice, whatever they hold
    with torch.no_grad():
        v = torch.randn_like(v)
        deep = inflate(net, axis=axis, strides3=1, how='centre', padding='zeros')
        first = deep(v)[0]
        assert apart(net(v.select(axis+2, 5))[0], first.select(axis+2, 5))<1e-5
        assert apart(inflate(net, axis=axis, strides3=1)(v)[0], first)>1e-3

def test_whole_networks_and_others():
    import torchvision
    for net in (made('resnet10t'), made('mobilenetv3_small_050'), shaken(torchvision.models.resnet18()),
            shaken(torchvision.models.squeezenet1_1()),
            shaken(nn.Sequential(nn.Conv2d(3,4,3,padding='same'), nn.AvgPool2d(3,2,1,ceil_mode=True),
                nn.ReflectionPad2d(1), nn.Conv2d(4,4,(1,3),padding_mode='circular',padding=(0,1)), nn.InstanceNorm2d(4),
                                                 nn.AdaptiveAvgPool2d((2,2)), nn.Flatten(), nn.Linear(16,2)))):
        x = torch.randn(1,3,64,64)
        with torch.no_grad(): assert apart(net(x), inflate(net)(x[...,None].expand(-1,-1,-1,-1,32)))<1e-5

@pytest.mark.parametrize('name,says',
        [('vit_tiny_patch16_224','PatchEmbed'), ('swin_tiny_patch4_window7_224','PatchEmbed'),
        ('mobilevit_xxs','MobileVitBlock'), ('inception_v3','InceptionA'), ('efficientvit_b0','LiteMLA'),
        ('hgnetv2_b0','StemV2')])
def test_no_third_axis_is_said(name, says):
    import timm  # noqa: F401
    net = timm.create_model(name, features_only=True)
    with pytest.raises(InputError, match=f'{says}.*two axes'): inflate(net)

def test_wrong_twins_are_found():
    class PerSlice(nn.Module):                              # runs in three axes, and does something else
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3,3,3,padding=1)
        def forward(self, x): return self.c(x) + torch.arange(float(x.shape[-1]))
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Conv2d(3,3,3,padding=1),PerSlice()
        def forward(self, x): return self.b(self.a(x))
    with pytest.raises(InputError, match='b .PerSlice'): inflate(Hidden())
    with pytest.raises(InputError, match='ConvTranspose2d'):
        inflate(nn.Sequential(nn.Conv2d(3,3,3), nn.ConvTranspose2d(3,3,2)))
    for kw in (dict(axis=3), dict(how='mean'), dict(padding='reflect'), dict(strides3=(1,3)), dict(kernels3=2)):
        with pytest.raises(InputError, match=next(iter(kw))): inflate(nn.Conv2d(3,3,3), **kw)

def test_squeeze_looks_at_the_whole_volume():
    net = made('regnety_002', features_only=True, out_indices=(0,1))
    deep = inflate(net)
    v = torch.randn(1,3,32,32,32)
    w = v.clone()
    w[...,-4:] += 3
    # the far end is felt at this one, through the squeeze
    with torch.no_grad():
        assert float((deep(v)[1][...,0]-deep(w)[1][...,0]).abs().max())>1e-6

def test_inflated_trains_pickles_and_is_fast():
    net = make_fast(inflate(made('regnety_002', features_only=True, out_indices=(0,1,2))))
    again = pickle.loads(pickle.dumps(net))
    v = torch.randn(2,3,16,16,16)
    a,b = net(v),again(v)
    assert all(torch.equal(p, q) for p,q in zip(a, b)) and type(again).__name__==type(net).__name__
    net.train()(v)[-1].mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())

# ---- names

@pytest.mark.parametrize('name,ndim,size', [('lcnet_050',2,(50,36)), ('vit_tiny_patch16_224',2,(40,64)),
        ('swin_tiny_patch4_window7_224',2,(64,64)), ('vgg11',2,(33,20)), ('inception_v4',2,(80,90)),
        ('visformer_tiny',2,(224,224)), ('timm.lcnet_050',3,(20,33,16)), ('resnet10',3,(20,20,9)),
        ('DenseNet121',2,(32,40))])
def test_a_decoder_on_any_encoder(name, ndim, size):
    kw = {'DenseNet121':dict(block_config=(2,2,2,2)), 'resnet10':dict(widen_factor=.25),
          'inception_v4':dict(levels=3)}.get(name, {})
    net,_ = create_network(name, 2, 3, ndim, patch=size, nf=4, **kw)
    x = torch.randn(2,2,*size)
    assert net(x).shape==(2,3,*size)
    net(x).mean().backward()
    idle = [k for k,p in net.named_parameters() if p.grad is None]
    assert not idle or name=='vit_tiny_patch16_224', idle[:3]
    groups = param_splitter(net)
    assert len(groups)==2 and len(groups[0])==len(list(net.encoder.parameters()))
    assert model_divisor(net)==net.divisor
    with pytest.raises(InputError, match='expected'): net(x[:,:1])

def test_names_and_arguments():
    assert isinstance(create_network('UNet', 1, 2, patch=(16,16,16), nf=4)[0],
            UNet) and type(create_network('SegResNet', 1, 2, init_filters=8)[0]).__name__=='MonaiNet'
    with pytest.raises(InputError, match="'resnet35'.*close.*resnet34"): create_network('resnet35', 1, 2, 2)
    with pytest.raises(InputError, match='zzz'): create_network('zzz', 1, 2)
    for bad in ('hf-hub:timm/resnet18','local-dir:/tmp/x'):
        assert not is_encoder(bad)
        with pytest.raises(InputError): create_network(bad, 1, 2, 2)
    with pytest.raises(ArgumentError, match="'depth'.*levels"): create_network('lcnet_050', 1, 2, 2, depth=3)
    with pytest.raises(ArgumentError, match="strides3"): create_network('lcnet_050', 1, 2, 2, strides3=1)
    with pytest.raises(ArgumentError, match="MONAI resnet10.*'levels'"): create_encoder('resnet10', 1, 3, levels=3)
    with pytest.raises(InputError, match='grey'): create_network('lcnet_050', 3, 2, 2, as_rgb=True)
    with pytest.raises(InputError, match='pretrained=True'): create_network('UNet', 1, 2, pretrained=True)
    with pytest.raises(InputError, match='MedicalNet'): create_encoder('resnet10', 1, 3, pretrained=True)
    with pytest.raises(InputError, match='no feature maps'): create_encoder('lcnet_050', 1, 2, levels=9)
    with pytest.raises(InputError, match='no weights for convnext_atto_rms'):
        create_encoder('convnext_atto_rms', 1, 2, pretrained=True)

def test_weights_that_cannot_be_fetched(monkeypatch):
    import timm  # noqa: F401
    real = timm.create_model
    def offline(name, pretrained=False, **kwargs):
        if pretrained: raise ConnectionError('Name or service not known')
        return real(name, **kwargs)
    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(FileError,
                       match="lcnet_050.*could not be fetched from timm/lcnet_050.*Name or "
                             "service.*pretrained='model.safetensors'"):
        create_encoder('lcnet_050', 1, 2, pretrained=True)
    seen = []
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained=False, **kw: (seen.append(pretrained),
                        shaken(real(name, **kw)))[1])
    torch.manual_seed(0)
    e,_ = create_encoder('lcnet_050', 1, 2, pretrained=True)
    # fetched weights are summed, and scaled from z-scores to what the network saw
    assert seen==[False,True]
    net = real('lcnet_050', features_only=True)
    adapt = adapt_input(deepcopy(net), 1, grey_scale((.229,.224,.225)))
    w = net.conv_stem.weight*torch.tensor([.226/.229,.226/.224,.226/.225]).view(1,3,1,1)
    assert torch.allclose(adapt.conv_stem.weight, w.sum(1, keepdim=True), atol=1e-6)

# ---- files

def medicalnet(depth=10):
    "A checkpoint with the names that MedicalNet gives: (state, the network that it is of)"
    import monai.networks.nets as nets
    net = shaken(getattr(nets, f'resnet{depth}')(spatial_dims=3, n_input_channels=1, feed_forward=False,
                                                 conv1_t_stride=2, bias_downsample=False, widen_factor=.25,
                                                 shortcut_type='B'))
    return {f'module.{k}':v for k,v in net.state_dict().items()}|{'module.conv_seg.0.weight':torch.zeros(8,128,2,2,
            2)},net

def test_medicalnet(tmp_path):
    sd,net = medicalnet()
    torch.save({'state_dict':sd, 'epoch':3, 'optimizer':{'lr':np.float64(.1), 'state':{}}}, tmp_path/'resnet_10.pth')
    e,rep = create_encoder('resnet10', 1, 3, pretrained=tmp_path/'resnet_10.pth', widen_factor=.25)
    x = torch.randn(1,1,32,32,32)
    want = net.layer4(net.layer3(net.layer2(net.layer1(net.maxpool(net.act(net.bn1(net.conv1(x))))))))
    assert torch.equal(e.eval()(x)[-1], want)
    assert rep.encoder[0]==rep.encoder[1] and rep.unmatched==[
            'module.conv_seg.0.weight'] and not rep.missing and 'resnet_10.pth' in str(rep)
    # two channels: the response to equal ones stays
    two,rep = create_encoder('resnet10', 2, 3, pretrained=tmp_path/'resnet_10.pth', widen_factor=.25)
    assert rep.adapted==['encoder.conv1.weight'] and apart(want, two.eval()(x.expand(-1,2,-1,-1,-1))[-1])<1e-5
    seg,rep = create_network('resnet10', 1, 2, pretrained=tmp_path/'resnet_10.pth', widen_factor=.25, nf=4)
    assert torch.equal(seg.eval().encoder(x)[-1], want) and rep.encoder[0]==rep.encoder[1]
    with pytest.raises(InputError, match='another shape'):
        create_encoder('resnet10', 1, 3, pretrained=tmp_path/'resnet_10.pth')
    with pytest.raises(InputError, match='none of its'):
        load_weights(UNet(1, 2, nf=4, depth=2), tmp_path/'resnet_10.pth')

class Block(nn.Module):
    "Convolution, norm, activation, as nnU-Net's building blocks name them"
    def __init__(self, i, o, s=1):
        super().__init__()
        self.conv,self.norm,self.nonlin = nn.Conv3d(i, o, 3, s, 1),nn.InstanceNorm3d(o, affine=True),nn.LeakyReLU(.01)
        self.all_modules = nn.Sequential(self.conv, self.norm, self.nonlin)
    def forward(self, x): return self.all_modules(x)
class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.convs = nn.Sequential(*blocks)
    def forward(self, x): return self.convs(x)
class Plain(nn.Module):
    "A plain U-Net with nnU-Net's names"
    def __init__(self, nfs=(4,8,16), n_out=3):
        super().__init__()
        self.encoder,self.decoder = nn.Module(),nn.Module()
        self.encoder.stages = nn.Sequential(*[nn.Sequential(Stack(Block(nfs[i-1] if i else 1, n, 2 if i else 1),
                Block(n, n))) for i,n in enumerate(nfs)])
        self.decoder.encoder = self.encoder
        self.decoder.stages = nn.ModuleList([Stack(Block(2*n, n), Block(n, n)) for n in nfs[-2::-1]])
        self.decoder.transpconvs = nn.ModuleList([nn.ConvTranspose3d(2*n, n, 2, 2) for n in nfs[-2::-1]])
        self.decoder.seg_layers = nn.ModuleList([nn.Conv3d(n, n_out, 1) for n in nfs[-2::-1]])
    def forward(self, x):
        skips = []
        for s in self.encoder.stages: skips.append(x:=s(x))
        skips.pop()
        for up,s in zip(self.decoder.transpconvs, self.decoder.stages): x = s(torch.cat([up(x),skips.pop()], 1))
        return self.decoder.seg_layers[-1](x)

def test_nnunet(tmp_path):
    torch.manual_seed(0)
    net = shaken(Plain())
    torch.save({'network_weights':net.state_dict(), 'current_epoch':1,
               'logging':{'ema':[np.float64(.5),np.float32(.1)]}, 'inference_allowed_mirroring_axes':(0,1,2)},
               tmp_path/'final.pth')
    own = UNet(1, 3, nf=4, depth=3)
    rep = load_weights(own, tmp_path/'final.pth')
    own.heads[-1].load_state_dict(net.decoder.seg_layers[-1].state_dict())
    x = torch.randn(1,1,16,16,16)
    with torch.no_grad(): assert apart(net(x), own(x))<1e-5
    assert rep.encoder==(18,18) and sorted(rep.missing)==['heads.0.bias','heads.0.weight']
    short,rep = UNet(2, 3, nf=4, depth=2),None              # two channels, and fewer levels than the file
    rep = load_weights(short, tmp_path/'final.pth')
    assert rep.encoder==(12,12) and rep.adapted==['encoder.0.0.weight'] and not any(k.startswith(('ups','decoder'))
            for k in rep.matched)
    with pytest.raises(InputError, match='none of its'): load_weights(UNet(1, 3, nf=8, depth=3), tmp_path/'final.pth')
    with pytest.raises(InputError, match='none of its'):
        load_weights(UNet(1, 3, nf=4, depth=3, kernels=[(3,3,1),3,3]), tmp_path/'final.pth')
    # nnssl keeps the encoder alone
    torch.save({f'module.{k}':v for k,v in net.encoder.state_dict(prefix='encoder.').items()}, tmp_path/'enc.pt')
    assert load_weights(UNet(1, 3, nf=4, depth=3), tmp_path/'enc.pt').encoder==(18,18)

class Residual(nn.Module):
    "A residual block with nnU-Net's names"
    def __init__(self, i, o, s=1):
        super().__init__()
        self.conv1,self.conv2 = Block(i, o, s),Block(o, o)
        del self.conv2.nonlin, self.conv2.all_modules[2]
        skip = Block(i, o)
        skip.conv = skip.all_modules[0] = nn.Conv3d(i, o, 1, bias=False)
        del skip.nonlin, skip.all_modules[2]
        self.skip = nn.Sequential(*([nn.AvgPool3d(s, s)] if s>1 else []), *([skip] if i!=o else []))
    def forward(self, x): return nn.functional.leaky_relu(self.conv2(self.conv1(x))+self.skip(x), .01)
class ResPlain(nn.Module):
    def __init__(self, nfs=(4,8,8), blocks=(1,2,1)):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.stem = Stack(Block(1, nfs[0]))
        self.encoder.stages = nn.Sequential(
                *[nn.Sequential(*[Residual(n if j else nfs[max(i-1,0)], n, 2 if i and not j else 1) for j in range(b)])
                  for i,(n,b) in enumerate(zip(nfs, blocks))])
        self.decoder = nn.Module()
        self.decoder.encoder = self.encoder
    def forward(self, x):
        x,fs = self.encoder.stem(x),[]
        for s in self.encoder.stages: fs.append(x:=s(x))
        return fs

def test_nnssl(tmp_path):
    torch.manual_seed(0)
    net = shaken(ResPlain(nfs=(4,8,16)))
    torch.save({'network_weights':{f'_orig_mod.{k}':v for k,v in net.state_dict().items()},
               'nnssl_adaptation_plan':{'architecture_plans':{'arch_class_name':'ResEncL'},
               'key_to_encoder':'encoder.stages', 'key_to_stem':'encoder.stem'}}, tmp_path/'mae.pth')
    e,rep = create_encoder('ResEnc', 1, 3, pretrained=tmp_path/'mae.pth', width=4, blocks=(1,2,1))
    x = torch.randn(1,1,16,16,16)
    with torch.no_grad(): assert apart(net(x), e(x))<1e-5 and rep.encoder[0]==rep.encoder[1] and not rep.missing
    # fewer levels, two channels
    seg,rep = create_network('ResEnc', 2, 3, pretrained=tmp_path/'mae.pth', width=4, blocks=(1,2), nf=4)
    assert rep.encoder[0]==rep.encoder[1] and rep.adapted and seg(torch.randn(1,2,16,16,16)).shape==(1,3,16,16,16)
    for kw in (dict(width=8), dict(blocks=(1,3,1))):
        with pytest.raises(InputError, match='none of its'):
            create_encoder('ResEnc', 1, 3, pretrained=tmp_path/'mae.pth', **{**dict(width=4, blocks=(1,2,1)), **kw})
    with pytest.raises(InputError, match='none of its'): load_weights(UNet(1, 3, nf=4, depth=3), tmp_path/'mae.pth')

@pytest.mark.parametrize('spoilt,says', [
    (lambda t: t*float('nan'), 'NaN or infinity'), (lambda t: t+float('inf'), 'NaN or infinity'),
    (lambda t: t.to(torch.complex64), 'complex64'), (lambda t: t.to(torch.int16), 'int16'),
    (lambda t: t.to_sparse(), 'sparse')])
def test_what_are_no_weights_is_not_loaded(tmp_path, spoilt, says):
    "NaN, numbers that would be rounded or lose a part: refused by the name of the tensor, and the network is as it was"
    from safetensors.torch import save
    net = UNet(1, 2, nf=4, depth=2)
    was = {k:v.clone() for k,v in net.state_dict().items()}
    torch.save({k:spoilt(v) for k,v in was.items()}, tmp_path/'w.pth')
    with pytest.raises(FileError, match=rf'w.pth: .*{says}'): load_weights(net, tmp_path/'w.pth')
    enc = {k.removeprefix('encoder.'):spoilt(v) for k,v in was.items() if k.startswith('encoder.')}
    if says not in ('sparse','complex64'):
        (tmp_path/'e.safetensors').write_bytes(save(enc, {'fastmed_encoder':'{"what": "x"}'}))
        with pytest.raises(FileError, match=rf'e.safetensors: .*{says}'): load_encoder(net, tmp_path/'e.safetensors')
    assert all(torch.equal(v, was[k]) for k,v in net.state_dict().items())

@pytest.mark.parametrize('line', ['{', '['*100_000, '[]', '{}', '7'])
def test_an_odd_line_of_an_encoder(tmp_path, line):
    from safetensors.torch import save
    (tmp_path/'e.safetensors').write_bytes(save({'a':torch.zeros(1)}, {'fastmed_encoder':line}))
    (tmp_path/'none.pth').write_bytes(b'')
    net = UNet(1, 2, nf=4, depth=2)
    with pytest.raises(FileError, match='e.safetensors: its description'): load_encoder(net, tmp_path/'e.safetensors')
    with pytest.raises(FileError, match='none.pth: no weights'): load_weights(net, tmp_path/'none.pth')

def test_files_that_are_refused(tmp_path):
    net = UNet(1, 2, ndim=2, nf=4, depth=2)
    with pytest.raises(MissingFileError): load_weights(net, tmp_path/'none.pth')
    with pytest.raises(MissingFileError): load_encoder(net, tmp_path/'none.safetensors')
    class Evil:
        def __reduce__(self): return open, (str(tmp_path/'ran'),'w')
    torch.save({'a':Evil()}, tmp_path/'evil.pth')
    pickle.dump(Evil(), open(tmp_path/'evil.safetensors','wb'))
    for f in (load_weights,load_encoder):
        for fn in ('evil.pth','evil.safetensors'):
            with pytest.raises(FileError): f(net, tmp_path/fn)
    assert not (tmp_path/'ran').exists()
    from safetensors.torch import save_file
    save_file({'a':torch.zeros(1)}, tmp_path/'bare.safetensors')
    with pytest.raises(FileError, match='without metadata'):
        load_encoder(net, tmp_path/'bare.safetensors')
    with pytest.raises(InputError, match='none of its 1'): load_weights(net, tmp_path/'bare.safetensors')
    with pytest.raises(InputError, match='no recognisable encoder'):
        save_encoder(nn.Linear(2,2), tmp_path/'x.safetensors')

def test_timm_files_by_name(tmp_path):
    import timm  # noqa: F401
    from safetensors.torch import save_file
    for name in ('resnet10t','convnext_atto','mobilenetv3_small_050','vit_tiny_patch16_224'):
        full = made(name)
        save_file(full.state_dict(), tmp_path/'f.safetensors')
        e,rep = create_encoder(name, 1, 2, patch=(224,224), pretrained=tmp_path/'f.safetensors')
        assert rep.encoder[0]==rep.encoder[1] and not rep.missing and not rep.mismatched, rep
        if name=='resnet10t':
            x = torch.randn(1,1,64,64)
            with torch.no_grad():
                assert apart(full.forward_features(x.expand(-1,3,-1,-1)), e.eval()(x)[-1])<1e-5
                deep,_ = create_encoder('timm.resnet10t', 1, 3, pretrained=tmp_path/'f.safetensors')
                assert apart(e(x)[-1][...,None], deep.eval()(x[...,None].expand(-1,-1,-1,-1,32))[-1])<1e-5
                # a 3D file fits the inflated network as it is
                save_encoder(nn.ModuleDict(dict(encoder=deep)), tmp_path/'deep.safetensors')
                again,rep = create_encoder('timm.resnet10t', 1, 3, pretrained=tmp_path/'deep.safetensors')
                assert all(torch.equal(p, q) for p,q in zip(deep.parameters(), again.parameters())), rep

# ---- between tasks

@pytest.mark.parametrize('arch,ndim,kw', [('UNet',3,dict(nf=4, depth=2)), ('UNet',2,dict(nf=4, depth=2)),
        ('lcnet_050',2,{}), ('timm.lcnet_050',3,dict(levels=3)), ('ResEnc',3,dict(width=4, blocks=(1,1)))])
def test_encoder_between_tasks(arch, ndim, kw, tmp_path, learner, loaders):
    f = unet3d_learner if ndim==3 else unet2d_learner
    seg = f(loaders[ndim], arch, path=tmp_path, **(kw if arch=='UNet' else {**kw, 'nf':4}))
    n_in = 1 if ndim==3 else 3
    clf = create_encoder_classifier(arch, n_in, 2, ndim, patch=(16,)*ndim, **kw)
    fn = save_encoder(clf, tmp_path/'clf.safetensors')
    assert not seg.pretrained
    assert seg.load_encoder(fn) is seg and seg.pretrained
    enc = seg.model.encoder.state_dict()
    assert all(torch.equal(v, enc[k]) for k,v in clf.encoder.state_dict().items())
    back = create_encoder_classifier(arch, n_in, 5, ndim, patch=(16,)*ndim, **kw)
    load_encoder(back, seg.save_encoder('sub/enc'))
    assert (tmp_path/'models/sub/enc.safetensors').exists()
    assert all(torch.equal(v, enc[k]) for k,v in back.encoder.state_dict().items())
    other = create_encoder_classifier(arch, n_in+1, 2, ndim, patch=(16,)*ndim, **kw)
    with pytest.raises(InputError, match=f"its encoder is .*{n_in} channel.*{n_in+1} channel.*weight.*expected"):
        load_encoder(other, fn)
    def names(m): return {k:v.clone() for k,v in m.state_dict().items()}
    was,moved = names(seg.model),[]
    class Look(Callback):
        order = 90
        def after_fit(self): moved.append({k for k,v in self.model.state_dict().items() if not torch.equal(v, was[k])})
    with seg.no_bar(), seg.no_logging(): seg.fine_tune(1, cbs=Look())
    frozen,free = moved
    # the encoder stands still first, running statistics included
    assert frozen and not any(k.startswith('encoder.') for k in frozen)
    assert any(k.startswith('encoder.') for k in free)
    assert seg.opt.hypers[0]['lr']<seg.opt.hypers[-1]['lr']

def test_an_encoder_below_a_wrapper(tmp_path):
    clf = create_encoder_classifier('lcnet_050', 1, 2, 2, levels=2)
    inner = nn.Sequential(clf, nn.Softplus())
    a,b = param_splitter(inner),param_splitter(clf)
    assert [len(o) for o in a]==[len(o) for o in b]==[len(list(clf.encoder.parameters())),2]
    save_encoder(inner, tmp_path/'e.safetensors')
    other = create_encoder_classifier('lcnet_050', 1, 3, 2, levels=2)
    load_encoder(other, tmp_path/'e.safetensors')
    assert all(torch.equal(p, q) for p,q in zip(clf.encoder.state_dict().values(), other.encoder.state_dict().values()))

def test_frozen_batch_norm_as_in_fastai_when_asked(loaders, tmp_path):
    learn = unet2d_learner(loaders[2], 'lcnet_050', nf=4, path=tmp_path, train_bn=True)
    learn.freeze()
    was = {k:v.clone() for k,v in learn.model.encoder.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    now = learn.model.encoder.state_dict()
    assert any('running_mean' in k and not torch.equal(v, now[k]) for k,
               v in was.items()) and all(torch.equal(v, now[k]) for k,v in was.items() if v.ndim==4)

# ---- ship

@pytest.mark.parametrize('arch,ndim,kw',
        [('lcnet_050',2,dict(nf=4)), ('timm.regnety_002',3,dict(nf=4, levels=2, how='centre', strides3=(1,2))),
        ('resnet10',3,dict(nf=4, widen_factor=.25)), ('ResEnc',3,dict(nf=4, width=4, blocks=(1,2))),
        ('vit_tiny_patch16_224',2,dict(nf=4))])
def test_by_name_in_a_file(arch, ndim, kw, loaders, study, tmp_path):
    path,df = study
    learn = (unet3d_learner if ndim==3 else unet2d_learner)(loaders[ndim], arch, path=tmp_path, **kw)
    if arch!='vit_tiny_patch16_224': shaken(learn.model)
    want = learn.predict_volume(path/df.image[0], proba=True)
    save_model(learn, tmp_path/'m.safetensors')
    learn.export('m.pkl')
    again,old = load_model(tmp_path/'m.safetensors', device='cpu'),load_learner(tmp_path/'m.pkl')
    for o in (again,old):
        got = o.predict_volume(path/df.image[0], proba=True)
        assert all(torch.equal(a.as_subclass(Tensor), b.as_subclass(Tensor)) for a,b in zip(want, got))
    assert again.arch==arch and ('timm' in again.facts)==(arch not in ('resnet10','ResEnc'))

def test_colours_travel(study, tmp_path):
    path,df = study
    dls = SliceDataLoaders.from_df(df, path=path, codes=['background','large','small'], valid_pct=.25, spacing=1.25,
                                   patch=16, bs=2, samples_per_case=1, num_workers=0, device='cpu',
                                   cache=tmp_path/'cache')
    learn = unet2d_learner(dls, 'lcnet_050', nf=4, as_rgb=True, path=tmp_path)
    save_model(learn, tmp_path/'m.safetensors')
    again = load_model(tmp_path/'m.safetensors', device='cpu')
    assert again.model.encoder.grey is not None and again.arch_args['as_rgb'] is True
    assert all(torch.equal(a.as_subclass(Tensor), b.as_subclass(Tensor)) for a,
               b in zip(learn.predict_volume(path/df.image[0], proba=True),
                        again.predict_volume(path/df.image[0], proba=True)))

def test_thick_slices_are_left_alone():
    class P(dict): __getattr__ = dict.get
    plan = P(strides=[(2,2,1),(2,2,1),(2,2,2)])
    assert thin_axis(plan, 'timm.lcnet_050', {})==dict(axis=2, strides3=(1,1,2)) and thin_axis(plan, 'resnet18',
            {})=={} and thin_axis(plan, 'timm.lcnet_050', dict(strides3=1))==dict(strides3=1)
    assert thin_axis(P(strides=[(2,2,2)]*3), 'timm.lcnet_050', {})=={}
