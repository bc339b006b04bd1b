"Networks: every name forward, one step, pickle; sizes, strides, refusals; parity of the instance norm."
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmed.models.unet import *
from fastmed.models.zoo import *

torch.set_num_threads(1)
SIZE = dict(SwinUNETR=32, FlexibleUNet=32)
SMALL = dict(UNet=dict(nf=4), SegResNet=dict(init_filters=8), SegResNetDS=dict(init_filters=8),
             SegResNetVAE=dict(vae_nz=8), DynUNet=dict(filters=(4,8,16,16)),
    VNet={}, SwinUNETR=dict(feature_size=12), UNETR=dict(feature_size=4, hidden_size=24, mlp_dim=24, num_heads=4),
    AttentionUnet=dict(channels=(4,8,16), strides=(2,2)),
    BasicUNet=dict(features=(4,4,8,8,8,4)), BasicUNetPlusPlus=dict(features=(4,4,8,8,8,4)), HighResNet={},
    FlexibleUNet=dict(decoder_channels=(16,8,8,4,4)), MedNeXt=dict(init_filters=4, kernel_size=3),
    unet_cicek={}, DenseVoxelNet=dict(growth=4, layers=2))
SMALL['monai.UNet'] = dict(channels=(4,8,16), strides=(2,2))
TWO_D = [n for n in SMALL if n not in ('unet_cicek','DenseVoxelNet')]

def test_every_name_is_tested(): assert set(SMALL)==set(model_names())

@pytest.mark.parametrize('name,ndim', [(n,3) for n in SMALL]+[(n,2) for n in TWO_D])
def test_network(name, ndim):
    torch.manual_seed(0)
    patch = (SIZE.get(name, 16),)*(ndim-1)+(32,)
    if name=='unet_cicek': patch = (16,8,8)
    m = create_model(name, 2, 3, ndim=ndim, patch=patch, **SMALL[name])
    x = torch.randn(2, 2, *patch)
    targ = torch.randint(0, 3, (2,*patch))
    opt = torch.optim.SGD(m.parameters(), 1e-3)
    out = m.train()(x)
    assert out.shape==(2,3,*patch)
    F.cross_entropy(out, targ).backward()
    opt.step()
    assert any(p.grad is not None and p.grad.abs().sum()>0 for p in m.parameters())
    m.eval()
    with torch.no_grad():
        a = m(x)
        assert a.shape==(2,3,*patch) and a.isfinite().all() and torch.equal(a, m(x))
        assert torch.equal(a, pickle.loads(pickle.dumps(m))(x))
    d = model_divisor(m)
    assert len(d)==ndim and all(p%i==0 for p,i in zip(patch, d))
    groups = param_splitter(m)
    assert sum(map(len, groups))==len(list(m.parameters())) and all(groups)
    assert len({id(p) for g in groups for p in g})==len(list(m.parameters()))

@pytest.mark.parametrize('name', ['SegResNet','SegResNetVAE','DynUNet','SwinUNETR','UNETR','VNet','AttentionUnet',
                                  'MedNeXt'])
def test_monai_takes_any_patch(name):
    m = create_model(name, 1, 2, ndim=2, patch=(40,56), **SMALL[name]).eval()
    with torch.no_grad(): assert m(torch.randn(1,1,40,56)).shape==(1,2,40,56)

@pytest.mark.parametrize('name', ['SegResNet','SegResNetDS','VNet','SwinUNETR','AttentionUnet','DynUNet','BasicUNet',
                                  'MedNeXt','monai.UNet','HighResNet'])
def test_stated_divisor_is_true(name):
    "A multiple of the divisor goes through MONAI's own network and keeps its size."
    m = create_model(name, 1, 2, ndim=2, **SMALL[name]).eval()
    d = model_divisor(m)
    size = [i*(3 if i<32 else 2) for i in d]
    with torch.no_grad(): assert m.model(torch.randn(1,1,*size)).shape==(1,2,*size)
    assert model_divisor(m.model)==d

def test_smallest_patch():
    "One voxel at the bottom is no use to an instance norm: the patch grows."
    for name in ('SwinUNETR','UNETR','BasicUNet','SegResNet','DynUNet'):
        n = SIZE.get(name, 16)
        m = create_model(name, 1, 2, ndim=2, patch=(n,n), **SMALL[name]).train()
        assert m(torch.randn(1,1,n,n)).shape==(1,2,n,n)

def test_fixed_size():
    m = create_model('UNETR', 1, 2, ndim=2, patch=(40,56), **SMALL['UNETR'])
    assert model_divisor(m)==(48,64)
    with pytest.raises(ValueError, match='built for 48×64'): m(torch.randn(1,1,64,64))
    with pytest.raises(ValueError, match='give `patch`'): create_model('UNETR', 1, 2, ndim=2)

def test_monai_deep_supervision():
    m = create_model('DynUNet', 1, 2, ndim=2, patch=(32,32), deep_supervision=True, deep_supr_num=2, **SMALL['DynUNet'])
    x = torch.randn(1,1,32,32)
    assert isinstance(m.train()(x), list) and m.eval()(x).shape==(1,2,32,32)
    m = create_model('BasicUNetPlusPlus', 1, 2, ndim=2, deep_supervision=True, **SMALL['BasicUNetPlusPlus'])
    assert len(m.train()(x))==4 and m.eval()(x).shape==(1,2,32,32)

def test_refusals():
    with pytest.raises(ValueError, match="'SegResnt'.*SegResNet"): create_model('SegResnt', 1, 2)
    with pytest.raises(ValueError, match='no network is named'): create_model('zzz', 1, 2)
    with pytest.raises(ValueError, match='no network is named'): create_model('Regressor', 1, 2)
    with pytest.raises(TypeError, match="UNet has no argument 'n_filters'.*depth"):
        create_model('UNet', 1, 2, n_filters=3)
    with pytest.raises(TypeError, match="VNet has no argument 'nf'.*dropout_prob"): create_model('VNet', 1, 2, nf=3)
    with pytest.raises(TypeError, match='follow'): create_model('VNet', 1, 2, in_channels=3)
    with pytest.raises(ValueError, match='volumes'): create_model('unet_cicek', 1, 2, ndim=2)
    with pytest.raises(ValueError, match='patch 20×24.*use 24×24'): create_model('UNet', 1, 2, ndim=2, patch=(20,24))
    with pytest.raises(ValueError, match='patch'): create_model('UNet', 1, 2, ndim=3, patch=(24,24))

def test_callables():
    def net(n_in, n_out): return nn.Conv2d(n_in, n_out, 3, padding=1)
    m = create_model(net, 1, 2, ndim=2, patch=(17,9))
    assert model_divisor(m)==(1,1)
    with pytest.raises(TypeError, match="net has no argument 'nf'"): create_model(net, 1, 2, ndim=2, nf=3)
    def with_dim(n_in, n_out, ndim, extra=1): return nn.Conv2d(n_in*extra, n_out, ndim)
    assert create_model(with_dim, 1, 2, ndim=2, extra=3).in_channels==3
    def anything(n_in, n_out, **kw): return nn.Conv2d(n_in, n_out, **kw)
    assert create_model(anything, 1, 2, ndim=2, kernel_size=5).kernel_size==(5,5)
    from functools import partial
    assert create_model(partial(UNet, nf=8), 1, 2, ndim=2).nfs[0]==8
    from monai.networks.nets import SegResNet
    assert create_model(SegResNet, 1, 2, ndim=2, init_filters=8)(torch.randn(1,1,17,20)).shape==(1,2,17,20)
    with pytest.raises(ValueError, match='divisor'): model_divisor(nn.Linear(2,2))
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(1,2,3)
        def forward(self, x): return self.c(x)
    with pytest.raises(ValueError, match='Odd'): model_divisor(Odd())

@pytest.mark.parametrize('kw,match', [(dict(strides=[2,2]),'strides: expected 3 entries'),
        (dict(strides=[(2,2),2,2]),'expected a positive int or 3'), (dict(kernels=4),'odd'),
    (dict(kernels=[3,1,3,3]),'skip voxels'), (dict(norm='layer'),"norm: expected"), (dict(ndim=4),'ndim'),
        (dict(depth=0),'depth'), (dict(nf=0),'nf')])
def test_unet_refuses(kw, match):
    with pytest.raises(ValueError, match=match): UNet(1, 2, **kw)

@pytest.mark.parametrize('ndim,strides', [(2,None),(3,None),(3,[(1,2,2),(1,2,2),2]),(2,[(3,2),2,(1,2)])])
def test_unet_sizes(ndim, strides):
    m = UNet(1, 2, ndim=ndim, nf=4, strides=strides).eval()
    d = m.divisor
    for k in (1,2):
        s = [i*(k+1) for i in d]
        with torch.no_grad(): assert m(torch.randn(1,1,*s)).shape==(1,2,*s)
    with pytest.raises(ValueError, match='total stride'): m(torch.randn(1,1,*[i*2+1 for i in d]))

def test_unet_options():
    for norm in ('instance','batch'):
        for act in (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.Tanh):
            m = UNet(1, 1, ndim=2, nf=4, depth=3, norm=norm, act=act, convs=1)
            m(torch.randn(2,1,16,16)).sum().backward()
    assert UNet(1, 1, ndim=2, nf=4, depth=1)(torch.randn(1,1,5,7)).shape==(1,1,5,7)
    assert max(UNet(1, 1, nf=64, depth=5).nfs)==320 and max(UNet(1, 1, ndim=2, nf=64, depth=5).nfs)==512
    assert UNet(1, 1, kernels=[1,3,3,3], strides=[1,2,2], nf=4).kernels[0]==(1,1,1)
    with pytest.raises(ValueError, match='one voxel'): UNet(1, 1, ndim=2, nf=4)(torch.randn(1,1,8,8))

def test_deep_supervision():
    m = UNet(1, 2, nf=4, deep_supervision=True, strides=[(2,2,1),2,2])
    outs = m.train()(torch.randn(1,1,16,16,8))
    assert [tuple(o.shape) for o in outs]==[(1,2,16,16,8),(1,2,8,8,8),(1,2,4,4,4)]
    sum(o.sum() for o in outs).backward()
    assert all(p.grad is not None for p in m.parameters())
    assert torch.equal(m.eval()(torch.ones(1,1,16,16,8)), m(torch.ones(1,1,16,16,8)))

def test_start_is_sane():
    "Kaiming: at the start activations neither die nor explode, and logits are near zero."
    torch.manual_seed(0)
    for ndim,s in ((2,(64,64)),(3,(32,32,32))):
        out = UNet(1, 3, ndim=ndim, nf=16)(torch.randn(2,1,*s))
        assert .1<out.std()<3, out.std()

@pytest.mark.parametrize('ndim', [2,3])
def test_instance_norm_parity(ndim):
    torch.manual_seed(0)
    ours,theirs = FastInstanceNorm(8).double(),(nn.InstanceNorm2d,nn.InstanceNorm3d)[ndim-2](8, affine=True).double()
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3,8,*(5,6,7)[:ndim]).double()*2+3
    for mf in (torch.contiguous_format, (torch.channels_last,torch.channels_last_3d)[ndim-2]):
        a,b = x.clone(memory_format=mf).requires_grad_(),x.clone().requires_grad_()
        g = torch.randn_like(x)
        ours.zero_grad()
        theirs.zero_grad()
        ya,yb = ours(a),theirs(b)
        ya.backward(g)
        yb.backward(g)
        torch.testing.assert_close(ya, yb)
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
        assert ya.is_contiguous(memory_format=mf)

def test_instance_norm_large_volume():
    "Many voxels far from zero: float32 sums in the fast layout stay exact enough."
    x = torch.randn(1,4,96,96,96)+20
    y = FastInstanceNorm(4)(x.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(y,
                               ((x.double()-x.double().mean((2,3,4),True))/x.double().std((2,3,4),correction=0,
            keepdim=True)).float(), atol=2e-3, rtol=1e-3)

@pytest.mark.parametrize('ndim', [2,3])
def test_fast_layout_same_answer(ndim):
    torch.manual_seed(0)
    m = UNet(1, 3, ndim=ndim, nf=8).eval()
    x = torch.randn(2,1,*(32,)*ndim)
    mf = (torch.channels_last,torch.channels_last_3d)[ndim-2]
    fast = copy.deepcopy(m).to(memory_format=mf)
    with torch.no_grad():
        a,b = m(x),fast(x.to(memory_format=mf))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        with torch.autocast('cpu', dtype=torch.bfloat16): c = fast(x.to(memory_format=mf))
    assert c.dtype==torch.bfloat16 and (a-c).abs().mean()<.05*a.abs().mean()

def test_cicek_count():
    assert sum(p.numel() for p in unet_cicek(3, 3).parameters() if p.requires_grad)==19_069_955
    assert sum(p.numel() for p in unet_cicek(3, 3).parameters())==19_069_955
    convs = [m for m in unet_cicek(3, 3).modules() if isinstance(m, nn.Conv3d)]
    assert [c.out_channels for c in convs]==[32,64,64,128,128,256,256,512,256,256,128,128,64,64,3]

def test_frozen_encoder():
    "`freeze` on the splitter's groups leaves the decoder alone."
    from fastai.vision.all import DataLoader, DataLoaders, Learner
    dl = DataLoader([(torch.randn(1,16,16), torch.zeros(16,16).long()) for _ in range(2)], bs=2)
    learn = Learner(DataLoaders(dl, dl), UNet(1, 2, ndim=2, nf=4, depth=3), loss_func=F.cross_entropy,
                    splitter=param_splitter, train_bn=False)
    learn.freeze()
    assert not any(p.requires_grad for p in learn.model.encoder.parameters())
    assert all(p.requires_grad for p in learn.model.decoder.parameters())
