"""What `fast=True` gains in a training step, and what the framework costs around it.

    FASTMED_DATA=… python benchmarks/speed.py            # everything, about 8 minutes on two cores
    FASTMED_DATA=… python benchmarks/speed.py --what step
    FASTMED_DATA=… python benchmarks/speed.py --what fit --ndim 3
    FASTMED_DATA=… python benchmarks/speed.py --device cuda      # the same on a GPU, about 2 minutes

`step`: forward, loss, backward and AdamW of the default network with the hooks of `make_fast`, against the same weights
in plain contiguous float32; the two take turns.
`fit`: `learn.fit_one_cycle` on the hippocampus with the defaults, against a bare PyTorch loop on the same network
(channels-last and bfloat16 too), with cases held in memory,
its own crops, augmentation, loss and one-cycle; the same number of updates, no validation in either. They run one after
the other, and the order changes every time.
"""
import argparse
import copy
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from common import here, keep, quiet, wait

import fastmed.all as fm
from fastmed.data.plan import has_bf16

shapes = {3:dict(nf=16, patch=(40,56,40), bs=4), 2:dict(nf=32, patch=(56,40), bs=32)}

# ---- a step
def step(ndim, steps, nf, patch, bs, depth=4, n_out=3, device='cpu'):
    from fastmed.all import DiceCELoss, UNet
    from fastmed.learn.fast import make_fast
    torch.manual_seed(0)
    net = UNet(1, n_out, ndim=ndim, nf=nf, depth=depth).to(device)
    x,y = torch.randn(bs, 1, *patch, device=device),torch.randint(0, n_out, (bs,*patch), device=device)
    loss = DiceCELoss()
    nets = dict(plain=net, fast=make_fast(copy.deepcopy(net)))
    opts = {k:torch.optim.AdamW(m.parameters(), 1e-3) for k,m in nets.items()}
    took = {k:[] for k in nets}
    for i in range(steps+2):                            # two to warm up
        for k in list(nets)[::1 if i%2 else -1]:
            wait(device)
            t0 = time.perf_counter()
            loss(nets[k](x), y).backward()
            opts[k].step()
            opts[k].zero_grad()
            wait(device)
            if i>1: took[k].append(time.perf_counter()-t0)
    r = {f'{k}_{n}_s':round(float(f(v)), 4) for n,f in (('min',np.min),('median',np.median)) for k,v in took.items()}
    return dict(what='step', ndim=ndim, batch='×'.join(map(str, (bs,*patch))), nf=nf, n=steps, **r,
                gain_min=round(min(took['plain'])/min(took['fast']), 2),
            gain_median=round(float(np.median(took['plain'])/np.median(took['fast'])), 2))

# ---- the bare loop
class Crops:
    """Batches of random crops of cases in memory, padded by the edge value; one in three is drawn around a structure,
    as fastmed draws them"""
    def __init__(self, cases, patch, bs, foreground=1/3):
        self.cases,self.patch,self.bs,self.foreground,self.rng = cases,np.array(
                patch),bs,foreground,np.random.default_rng(0)
    def one(self):
        x,y,fg = self.cases[self.rng.integers(len(self.cases))]
        room = np.array(y.shape)-self.patch
        pad = np.maximum(-room, 0)
        if pad.any():
            ps = [(p,p) for p in pad]
            x,y = np.pad(x, ps, mode='edge'),np.pad(y, ps, mode='edge')
        # of the first voxel: anywhere that holds the case, or lies inside it
        hi = np.abs(room)
        if self.rng.random()<self.foreground and len(fg):
            c = np.clip(fg[self.rng.integers(len(fg))]+pad-self.patch//2, 0, hi)
        else: c = self.rng.integers(0, hi+1)
        sl = tuple(slice(a, a+p) for a,p in zip(c, self.patch))
        return x[sl],y[sl]
    def batch(self):
        x,y = (torch.from_numpy(np.stack(o)) for o in zip(*[self.one() for _ in range(self.bs)]))
        if 1 in self.patch:
            a = int(np.argmin(self.patch))+1
            x,y = x.squeeze(a),y.squeeze(a)
        return x[:,None],y

def turn(x, y, rotate=math.pi/12, scale=.25, contrast=.25, noise=.1):
    "Rotation and scale by one grid, contrast and noise, for 2D and 3D"
    n,nd = len(x),x.ndim-2
    u = lambda *s: torch.rand(*s, device=x.device)*2-1
    R = torch.eye(nd, device=x.device).repeat(n,1,1)
    for i,j in ((0,1),(1,2),(0,2)) if nd==3 else ((0,1),):
        a = u(n)*rotate
        r = torch.eye(nd, device=x.device).repeat(n,1,1)
        r[:,i,i],r[:,j,j],r[:,i,j],r[:,j,i] = a.cos(),a.cos(),-a.sin(),a.sin()
        R = R@r
    size = torch.tensor(x.shape[2:][::-1], dtype=torch.float, device=x.device)
    th = torch.cat([R*size/size[:,None]/(1+u(n,1,1)*scale), torch.zeros(n,nd,1, device=x.device)], 2)
    g = F.affine_grid(th, x.shape, align_corners=False)
    x = F.grid_sample(x, g, padding_mode='border', align_corners=False)
    y = F.grid_sample(y[:,None].float(), g, mode='nearest', padding_mode='border', align_corners=False)[:,0].long()
    col = (n,)+(1,)*(nd+1)
    m = x.mean(tuple(range(1, nd+2)), keepdim=True)
    return (x-m)*(1+u(*col)*contrast)+m+torch.randn_like(x)*torch.rand(*col, device=x.device)*noise, y

def dice_ce(z, y):
    "Cross-entropy plus soft Dice of the foreground, as everybody writes it"
    z = z.float()
    p = z.softmax(1).flatten(2)[:,1:]
    t = F.one_hot(y, z.shape[1]).movedim(-1,1).flatten(2)[:,1:].float()
    return F.cross_entropy(z, y) + 1-((2*(p*t).sum(2)+1)/(p.sum(2)+t.sum(2)+1)).mean()

def bare(net, crops, updates, lr=3e-3, bf16=True, device='cpu'):
    fmt = torch.channels_last_3d if crops.patch.min()>1 else torch.channels_last
    net = net.to(device, memory_format=fmt).train()
    opt = torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-2)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=updates, pct_start=.25)
    for _ in range(updates):
        x,y = turn(*[o.to(device) for o in crops.batch()])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): z = net(x.to(memory_format=fmt))
        dice_ce(z, y).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 12.)
        opt.step()
        sched.step()
        opt.zero_grad()

# ---- the same through fastmed
def held_cases(ds):
    "Cases in memory, as the bare loop wants them: image, mask, voxels of structures"
    for i in range(len(ds)):
        x,y = (t.as_subclass(torch.Tensor).numpy() for t in ds[i])
        yield x[0].copy(),y.astype(np.int64),np.argwhere(y)

def seconds_of_fit(dls, warm, device):
    "One epoch through fastmed without validation; `warm`: three updates alone"
    class NoValidation(fm.Callback):
        def before_validate(self): raise fm.CancelValidException()
    class Stop(fm.Callback):
        def after_batch(self):
            if self.iter==2: raise fm.CancelFitException()
    learn = (fm.unet3d_learner if dls.plan.ndim==3 else fm.unet2d_learner)(dls, cbs=NoValidation())
    t0 = time.perf_counter()
    with quiet(): learn.fit_one_cycle(1, 3e-3, cbs=Stop() if warm else None)
    wait(device)
    seconds = time.perf_counter()-t0
    assert warm or len(learn.recorder.losses)==len(dls.train)
    return seconds

def seconds_of_loop(dls, crops, warm, device):
    "As many updates of the bare loop"
    plan = dls.plan
    net = fm.UNet(1, len(dls.codes), ndim=plan.ndim, nf=plan.nf, strides=plan.strides, depth=plan.depth)
    t0 = time.perf_counter()
    bare(net, crops, 3 if warm else len(dls.train), bf16=has_bf16(device), device=device)
    wait(device)
    return time.perf_counter()-t0

def fit(ndim, repeats, n_cases=None, samples='auto', device='cpu'):
    from hippocampus import cases
    df = cases()
    if n_cases: df = df.groupby('valid').head(n_cases).reset_index(drop=True)
    df.attrs['codes'] = ['background','anterior','posterior']
    fm.set_seed(0)
    with quiet():
        dls = (fm.VolumeDataLoaders if ndim==3 else fm.SliceDataLoaders).from_df(
            df, valid_col='valid', samples_per_case=samples, device=device)
    plan = dls.plan
    crops = Crops(list(held_cases(dls.train_ds)), plan.patch, dls.train.bs)
    a,b = torch.randn(2,3,8,8),torch.randint(0,3,(2,8,8))
    assert abs(fm.DiceCELoss()(a,b)-dice_ce(a,b))<1e-5, 'the two losses differ'
    ways = dict(fastmed=lambda warm: seconds_of_fit(dls, warm, device),
                bare=lambda warm: seconds_of_loop(dls, crops, warm, device))
    for f in ways.values(): f(True)
    took = {k:[] for k in ways}
    for i in range(repeats):
        for k in list(ways)[::1 if i%2==0 else -1]: took[k].append(ways[k](False))
    return dict(what='fit', ndim=ndim, batch='×'.join(map(str, (dls.train.bs,*plan.patch))), nf=plan.nf,
                n=len(dls.train), repeats=repeats,
                **{f'{k}_s':' '.join(f'{o:.1f}' for o in v) for k,v in took.items()},
                ratio=round(sum(took['fastmed'])/sum(took['bare']), 3),
                ratio_min=round(min(took['fastmed'])/min(took['bare']), 3))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--what', choices=['step','fit','both'], default='both')
    p.add_argument('--ndim', type=int, nargs='+', default=[3,2])
    p.add_argument('--steps', type=int, default=12, help='timed steps of each kind')
    p.add_argument('--repeats', type=int, default=2, help='of fit and bare loop')
    p.add_argument('--cases', type=int, default=None, help='training cases and validation cases, all by default')
    p.add_argument('--samples', type=int, default=None, help="patches a case; default: fastmed's")
    p.add_argument('--tiny', action='store_true', help='a network of 4 features: does the script run?')
    p.add_argument('--device', default='cpu')
    p.add_argument('--out', default=here/'speed.csv')
    a = p.parse_args()
    if a.what!='fit':
        keep([step(d, a.steps, **{**shapes[d], **({'nf':4,'bs':1} if a.tiny else {})}, device=a.device)
                for d in a.ndim], a.out, ['what','ndim','nf'], a.device)
    if a.what!='step':
        keep([fit(d, a.repeats, a.cases, a.samples or 'auto', a.device) for d in a.ndim], a.out, ['what','ndim','nf'],
                a.device)
