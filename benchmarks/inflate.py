"""Does a network inflated to three axes answer what its parent answers, and does an adapted one see grey as the
original sees stacked grey?

Random weights, and statistics of the norms that are no ones and zeros. An image of 64 × 64 pixels (96 where a network
needs it), and the same as every one of 32 or more slices; the
difference is the largest over all feature maps, as a share of the map's largest value; in float32, and once in float64,
where nothing but a wrong computation is left.

    python benchmarks/inflate.py                  # inflate.csv and adapt.csv, about ten minutes of one core
"""
import argparse
import copy
import sys
import warnings
from pathlib import Path

import pandas as pd
import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
from phantoms import shaken

from fastmed.models.adapt import adapt_input, first_convs
from fastmed.models.inflate import inflate

inflatable = '''resnet18 resnet50 resnext50_32x4d wide_resnet50_2 seresnet18 ecaresnet26t resnetblur18 resnetaa34d
skresnet18 resnest14d res2net50_26w_4s gcresnet33ts densenet121 densenetblur121d efficientnet_b0 tf_efficientnet_b0
efficientnet_lite0 tf_efficientnetv2_s mixnet_s mobilenetv2_050 mobilenetv3_large_100 mobilenetv4_conv_small lcnet_050
mnasnet_small convnext_tiny convnextv2_atto inception_next_atto regnetx_002 regnety_002 regnetz_005 regnetv_040
hrnet_w18_small vgg11 vgg11_bn resnetv2_50 resnetv2_50x1_bit nf_resnet26 nfnet_l0 eca_nfnet_l0 dm_nfnet_f0 cspresnet50
cs3darknet_s dla34 dpn48b ese_vovnet19b_dw ghostnet_050 gernet_s repvgg_a0 mobileone_s0 rexnet_100 selecsls42
legacy_seresnet18 inception_v4 xception41 legacy_xception repghostnet_050 repvit_m0_9 fasternet_t0 starnet_s1
convmixer_768_32 fastvit_t8'''.split()
refused = (
        '''vit_tiny_patch16_224 swin_tiny_patch4_window7_224 mobilevit_xxs coatnet_nano_rw_224 inception_v3 hgnetv2_b0
        tresnet_m poolformer_s12'''.split())
adaptable = '''resnet18 resnext50_32x4d seresnet18 densenet121 efficientnet_b0 tf_efficientnet_b0
mobilenetv3_large_100 convnext_tiny regnety_002 vgg11_bn hrnet_w18_small repvgg_a0 mobileone_s0 resnetv2_50x1_bit
eca_nfnet_l0 xception41 inception_v4
ghostnet_050 edgenext_xx_small vit_tiny_patch16_224 deit_tiny_patch16_224 beit_base_patch16_224
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 pvt_v2_b0 maxvit_nano_rw_256 crossvit_tiny_240
visformer_tiny'''.split()

def apart(a, b):
    a,b = ([o] if isinstance(o, torch.Tensor) else list(o) for o in (a,b))
    return max(float((q-p).abs().max()/p.abs().max()) for p,q in zip(a, b, strict=True))

def image(net, dtype):
    for n in (64,96,128):
        x = torch.randn(1, 3, n, n, generator=torch.Generator().manual_seed(0)).to(dtype)
        try:
            net(x)
            return x
        except RuntimeError: pass

@torch.no_grad()
def inflation():
    for name in inflatable+refused:
        torch.manual_seed(0)
        net = shaken(timm.create_model(name, features_only=True))
        row,n = dict(family=name, parameters_2d=sum(p.numel() for p in net.parameters())),0
        try:
            for how in ('average','centre'):
                for dt in (torch.float32,torch.float64):
                    net.to(dt)
                    deep = inflate(net, how=how, check=dt==torch.float32)
                    x = image(net, dt)
                    n = x.shape[-1]
                    for depth in (32,n):
                        try:
                            b = deep(x[...,None].repeat(1,1,1,1,depth))
                            break
                        except RuntimeError:
                            # an unpadded convolution needs more slices
                            continue
                    row[f'{how}_{str(dt)[6:]}'] = apart([o[...,None] for o in net(x)], b)
                row['parameters_3d'] = sum(p.numel() for p in deep.parameters())
                net.float()
            row['status'] = 'equal'
        except ValueError as e: row['status'] = f'refused: {str(e).partition(": ")[2].partition(" is written")[0]}'
        print(row, flush=True)
        yield row

SIDES = {'240':240, '256':256, 'visformer_tiny':224, 'inception_v4':96}

@torch.no_grad()
def adaptation():
    for name in adaptable:
        torch.manual_seed(0)
        small = any(o in name for o in ('vit_','deit','beit','swin_'))
        fixed = any(o in name for o in ('240','256','crossvit','maxvit','pvt'))
        net = shaken(timm.create_model(name, **(dict(img_size=64) if small and not fixed else {})))
        n = next((n for k,n in SIDES.items() if k in name), 64)
        x = torch.randn(1, 1, n, n, generator=torch.Generator().manual_seed(0))
        want,row = net(x.expand(-1,3,-1,-1)),dict(family=name, first_convolution=' '.join(first_convs(net)))
        for k in (1,2,4,9): row[f'channels_{k}'] = apart(want, adapt_input(copy.deepcopy(net), k)(x.expand(-1,k,-1,-1)))
        net.double()
        x = x.double()
        for k in (1,4):
            row[f'channels_{k}_float64'] = apart(net(x.expand(-1,3,-1,-1)),
                adapt_input(copy.deepcopy(net), k)(x.expand(-1,k,-1,-1)))
        print(row, flush=True)
        yield row

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--what', default='adapt,inflate', help='adapt, inflate')
    p.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder of the tables')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    if 'adapt' in a.what: pd.DataFrame(adaptation()).to_csv(a.out/'adapt.csv', index=False, float_format='%.1e')
    if 'inflate' in a.what: pd.DataFrame(inflation()).to_csv(a.out/'inflate.csv', index=False, float_format='%.1e')
