# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # plan
#
# > Which patches, how many in a batch, how wide a network: from the data, the memory, and the time that there is.

# %%
#| default_exp data.plan

# %% [markdown]
# What patch, how many in a batch, how deep a network? nnU-Net showed that the data and a memory budget answer this. `suggest_plan` gives the answer and
# the reason for each line; every line can be overridden, and it is what `'auto'` means everywhere.
#
# Memory is not the only budget. On a CPU without bfloat16 the patch that fits the memory can take five seconds an update: two minutes hold 23 updates, and nothing is learnt. Who says how long the training will be,
# `suggest_plan(df, minutes=2)`, gets a plan for this machine: it is measured once, and what would give too few updates is made smaller. The `Plan` keeps what was measured and chosen, so every fold, seed and resumed run
# can share it.

# %%
#| export
import contextlib
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from fastai.data.all import default_device
from fastcore.all import first, ifnone, is_listy
from fastmed.core import InputError, spacing_of
from fastmed.data.preprocess import all_files, auto_spacing, Plan, Preprocess
from fastmed.io.volumes import read_header

# %%
from fastai.data.all import *

# %%
#| hide
from fastcore.test import *
import os

# %% [markdown]
# ## The patch that fits the memory
#
# The rules, in order. The *spacing* is `auto_spacing`. The *axis* across which 2D slices are cut is the coarsest one; between equals, the one along
# which the scan is shortest, so that the slices are large. The *strides* halve an axis while at least four voxels are left, and while its voxels are
# not already over twice as coarse as the finest. The *patch* starts as the median scan, rounded up to what the strides divide, and its longest side (in
# mm) shrinks until a batch of two fits the budget; the *batch* then fills it. The budget counts the activations that training keeps: about `BYTES` a
# voxel and feature, measured on our `UNet`: 28 to 31 in 3D under bfloat16, so there is room to spare.

# %%
#| export
BYTES = 40 # bytes that training holds for each voxel and each feature of the first level

def _strides(size, spacing, axes, max_depth=6):
    "Per level below the top: 2 for an axis with at least 8 voxels left and a spacing under twice the finest, else 1"
    size,sp,res = np.array(size, float),np.array(spacing, float),[]
    while len(res)<max_depth-1:
        s = [2 if a in axes and size[a]/2>=4 and sp[a]<=2*min(sp[b] for b in axes if size[b]/2>=4) else 1
             for a in range(3)]
        if max(s)==1: break
        size,sp = size/s, sp*s
        res.append(s)
    return res

def _dividing_strides(p, sp, axes):
    "As many strides as divide the patch"
    st = _strides(p, sp, axes)
    while st and any(p[a]%int(np.prod(st,0)[a]) for a in axes): st.pop()
    return st

def patch_plan(
    patch,          # (3,) voxels; a 1 makes it a slice across that axis
    spacing=None,   # (3,) mm, for the strides; default: isotropic
    context:int=0,  # slices: neighbours on each side, as channels
    nf:int=None     # features of the first level
)->Plan:            # ndim, spacing, patch, strides, depth, nf; for slices axis and context
    "The plan of a patch that is given by hand. Raises `ValueError` on anything but three sizes, at most one of them 1"
    p = tuple(int(o) for o in patch)
    if len(p)!=3 or min(p)<1 or p.count(1)>1:
        raise InputError(f"patch: expected three sizes, one of them 1 for slices; found {patch}")
    ndim = 2 if 1 in p else 3
    axes = [a for a in range(3) if p[a]>1]
    strides = [tuple(s[a] for a in axes) for s in _dividing_strides(p, spacing or (1,1,1), axes)]
    d = dict(ndim=ndim, spacing=spacing, patch=p, strides=strides, depth=len(strides)+1,
             nf=ifnone(nf, 16 if ndim==3 else 32))
    if ndim==2: d.update(axis=p.index(1), context=context)
    return Plan(d)

def default_memory(
    device=None # torch device; default: fastai's
)->float:       # GiB
    "Memory budget of a plan: 60 % of a GPU, at most 24 GiB; on a CPU 0.5 GiB, because there memory is time (such a step takes about 2 s on two cores)"
    device = torch.device(ifnone(device, default_device()))
    if device.type!='cuda': return .5
    return min(24, .6*torch.cuda.get_device_properties(device).total_memory/2**30)


# %%
#| exporti
def _rounded(p, st, axes):
    "A patch, rounded up to what the strides divide"
    d = np.prod(st, 0) if st else np.ones(3)
    return [int(math.ceil(p[a]/d[a])*d[a]) if a in axes else 1 for a in range(3)]

def _whole_scan(med, sp, axes):
    "(patch, strides) that hold the median scan"
    want = np.array([med[a] if a in axes else 1 for a in range(3)])
    st = _strides(want, sp, axes)
    return _rounded(want, st, axes), st

def _shrunk(p, st, sp, axes):
    "(patch, strides), the longest side in mm a step shorter; the same patch where nothing can be shorter"
    long = [a for a in axes if p[a]>8]
    if not long: return p, st
    a = max(long, key=lambda a: p[a]*sp[a])
    want = np.array(p, float)
    want[a] = max(8, p[a]-max(4, np.prod(st, 0)[a] if st else 1))
    st = _strides(want, sp, axes)
    return _rounded(want, st, axes), st

def _samples(bs, cases): return max(1, math.ceil(64*bs/max(1, cases)))


# %% [markdown]
# ## What a machine does in a second
#
# Two machines of one kind differ, and so do two layouts on one machine: channels-last with bfloat16 is two to five times as fast as plain float32 where the processor has the instructions, and no faster on some that have
# not. So nothing is looked up. `measure_machine` trains a small network of the U-Net's kind for some updates: two levels, forward and backward, the resampling of an augmentation before it and a loss behind it. It divides the
# time by the operations. The quickest update counts, since whatever else a machine does can only make one slower.

# %%
#| export
def has_bf16(
    device # torch device
)->bool:   # True where a CPU or GPU has the instructions
    "Whether a device computes in bfloat16, instead of imitating it"
    device = torch.device(device)
    if device.type=='cuda': return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type=='cpu':
        return any(getattr(torch.cpu, f, bool)() for f in ('_is_avx512_bf16_supported','_is_amx_tile_supported'))
    return False


# %%
#| exporti
def update_gflops(
    patch,     # voxels, one number an axis of the network
    bs:int,    # patches in a batch
    nf:int,    # features of the first level
    strides,   # one tuple for each level below the first
    n_in:int=1 # channels of the network's input
)->float:      # 10⁹ multiplications and additions, each counted
    "What the convolutions of the default `UNet` compute in an update: once forward, twice that backward"
    ndim,most = len(patch),max(nf, 320 if len(patch)==3 else 512)
    nfs = [min(nf*2**i, most) for i in range(len(strides)+1)]
    voxels,total = math.prod(patch),0
    for i,n in enumerate(nfs):
        flat = [i<len(strides) and all(s[a]==1 for s in strides[:i+1]) for a in range(ndim)]
        kernel = math.prod(1 if o else 3 for o in flat)
        if i: voxels /= math.prod(strides[i-1])
        total += voxels*kernel*n*((nfs[i-1] if i else n_in)+n)
        if i<len(strides): total += voxels*n*(kernel*3*n+nfs[i+1])
    return 6*bs*total/1e9


# %% [markdown]
# That count against PyTorch's own, of the real network. What differs is the output layer, and the gradient of the image, which nobody needs:

# %%
#| hide
from fastmed.models.unet import UNet
from torch.utils.flop_counter import FlopCounterMode


# %%
def counted(patch, bs, nf, strides, n_in):
    net = UNet(n_in, 3, ndim=len(patch), nf=nf, depth=len(strides)+1, strides=strides)
    with FlopCounterMode(display=False) as c: net(torch.zeros(bs, n_in, *patch)).sum().backward()
    return c.get_total_flops()/1e9
rows = [((32,48,32), 2, 8, [(2,2,2)]*3, 2), ((64,32), 4, 16, [(2,2)]*4, 1),
        ((32,32,8), 1, 8, [(2,2,1),(2,2,1),(2,2,2)], 1)]
t = pd.DataFrame([dict(patch='×'.join(map(str, r[0])), estimated=update_gflops(*r), counted=counted(*r)) for r in rows])
assert (t.estimated/t.counted).between(.97, 1.03).all(), t
t.round(2)


# %%
#| exporti
def _update_probe(ndim, nf, n_in, size, bs, fast, device):
    "A function that does one update of a network of two levels: resampled input, forward, loss, backward"
    conv,up = (F.conv2d,F.conv_transpose2d) if ndim==2 else (F.conv3d,F.conv_transpose3d)
    layout = (torch.channels_last if ndim==2 else torch.channels_last_3d) if fast else torch.contiguous_format
    g = torch.Generator().manual_seed(0)
    def weight(n_out, n_in, k):
        w = torch.randn(n_out, n_in, *(k,)*ndim, generator=g)/math.sqrt(n_in*k**ndim)
        return w.to(device).contiguous(memory_format=layout).requires_grad_()
    a,b,c,d,e,f = [weight(*o, 3) for o in ((nf,n_in), (nf,nf), (2*nf,nf), (2*nf,2*nf), (nf,2*nf), (nf,nf))]
    u,out = weight(2*nf, nf, 2),weight(4, nf, 1)
    x = torch.randn(bs, n_in, *(size,)*ndim, generator=g).to(device)
    y = torch.randint(4, (bs, *(size,)*ndim), generator=g).to(device)
    grid = F.affine_grid(torch.eye(ndim, ndim+1, device=device).expand(bs, -1, -1), x.shape, align_corners=False)
    def norm(o): return F.batch_norm(o, None, None, training=True) if fast else F.group_norm(o, o.shape[1])
    def stage(o, w, stride=1): return F.leaky_relu(norm(conv(o, w, stride=stride, padding=1)), .01, inplace=True)
    def forward(o):
        top = stage(stage(o, a), b)
        low = stage(stage(top, c, 2), d)
        return conv(stage(stage(torch.cat([up(low, u, stride=2), top], 1), e), f), out)
    def update():
        o = F.grid_sample(x, grid, align_corners=False).contiguous(memory_format=layout)
        short = torch.autocast(device.type, torch.bfloat16) if fast and has_bf16(device) else contextlib.nullcontext()
        with short: o = forward(o)
        torch.autograd.grad(F.cross_entropy(o.float(), y), [a,b,c,d,e,f,u,out])
    return update


# %%
#| exporti
def seconds_of(
    f,     # function without arguments
    device # torch device that it works on
)->float:  # seconds
    "How long one call takes"
    t0 = time.perf_counter()
    f()
    if device.type=='cuda': torch.cuda.synchronize(device)
    return time.perf_counter()-t0

def measure_machine(
    ndim:int,        # 2: slices, 3: volumes
    nfs,             # features of the first level that are in question
    n_in:int=1,      # channels of the network's input
    device=None,     # torch device; default: fastai's
    seconds:float=.4 # that the measuring should take, about; each network does three updates at least
# 'device', 'bf16', 'threads'; 'seconds': features, as text → seconds for 10⁹ operations, 'fast' and 'plain'
)->dict:
    "How long this machine takes for the updates of networks of some widths: channels-last (in bfloat16 where it has that), and in plain float32"
    device = torch.device(ifnone(device, default_device()))
    size,bs = ({3:24, 2:64}[ndim],2) if device.type=='cpu' else ({3:96, 2:256}[ndim],{3:2, 2:16}[ndim])
    probes = {(nf,how):_update_probe(ndim, nf, n_in, size, bs, how=='fast', device) for nf in sorted(map(int, nfs))
            for how in ('fast','plain')}
    for f in probes.values(): seconds_of(f, device)                    # the first time is never the quickest
    best,rounds,t0 = {k:math.inf for k in probes},0,time.perf_counter()
    while rounds<3 or time.perf_counter()-t0<seconds:
        best = {k:min(best[k], seconds_of(f, device)) for k,f in probes.items()}
        rounds += 1
    res = {}
    for (nf,how),s in best.items():
        res.setdefault(str(nf), {})[how] = s/update_gflops((size,)*ndim, bs, nf, [(2,)*ndim], n_in)
    return dict(device=device.type, bf16=has_bf16(device), threads=torch.get_num_threads(), seconds=res)


# %%
#| hide
was = torch.get_rng_state()
m = measure_machine(3, (8,4), device='cpu', seconds=.1)
assert torch.equal(was, torch.get_rng_state()), 'measuring must draw no number of the training'
test_eq(list(m['seconds']), ['4','8'])
assert all(v>0 for o in m['seconds'].values() for v in o.values())

# %% [markdown]
# A network of two levels is not the real one, and small tensors lie in the cache. So it was compared with real updates (U-Net, Dice and cross-entropy, AdamW) on a machine with two cores, in GFLOP/s of the quicker layout:
#
# | patches | features | float32, AVX-512: real | measured | AVX2: real | measured |
# |---|---|---|---|---|---|
# | 2 of 40³ | 8 | 73 | 53 to 71 | 48 | 49 to 55 |
# | 2 of 48³ | 16 | 169 | 144 to 205 | 108 | 99 to 108 |
# | 2 of 64×80×80 | 16 | 135 | 144 to 205 | 72 | 99 to 108 |
# | 8 of 96×80 | 16 | 116 | 118 to 123 | 83 | 76 to 82 |
# | 8 of 96×80 | 32 | 170 | 164 to 192 | 132 | 107 to 119 |
#
# So it is right within a fifth for the sizes between which it has to choose. A large patch leaves the cache and takes up to 1.5 times as long as it says; a patch as large as that is taken where there is time in plenty. The width counts: with
# 8 features a processor does less than half of what it does with 16. (One volume alone in a batch is avoided: PyTorch then runs small 3D convolutions without oneDNN, ten times slower.)
#
# Of a training's minutes, nine tenths are counted for updates; the rest is validation, and what is read from disk for the first time.

# %%
#| exporti
UPDATES = 300    # of the weights: fewer teach a network little

def update_seconds(
    plan:Plan,    # with ndim, patch, strides, bs and nf
    machine:dict, # of `measure_machine`
    n_in:int=1    # channels of the network's input
)->float:         # seconds
    "How long an update of a plan takes on a machine that was measured; nothing is measured here"
    size = [p for p in plan.patch if plan.ndim==3 or p>1]
    return .01 + update_gflops(size, plan.bs, plan.nf, plan.strides,
            n_in)*min(machine['seconds'][str(plan.nf)].values())

def updates_in(
    minutes:float, # of training and validation
    seconds:float  # of an update
)->int:            # updates
    "How many updates a training holds"
    return int(60*minutes*.9/seconds)


# %% [markdown]
# ## What is made smaller, and in which order
#
# A plan that gives `UPDATES` in its minutes stays as it is. Else the first smaller one that does is taken:
#
# 1. fewer patches in a batch, not under 2 volumes or 8 slices: as many patches are seen, in more updates;
# 2. a smaller patch, down to 40³ voxels or 96² pixels;
# 3. half the features, which is a quarter of the work;
# 4. a smaller patch still, down to 24³ voxels or 48² pixels.
#
# The order was tried by hand on a brain cohort (`fastmed demo`), on a CPU of two cores without bfloat16, two minutes a training: the plan of memory alone gave 23 updates in 3D and 13 in 2D, and a Dice of 0.69; 40³ patches two at a
# time with 8 features gave 427 updates and 0.871; slices of 96² eight at a time with 16 features 339 updates and 0.895. What the caller gave is never changed.

# %%
#| exporti
def _resized(plan, axes, patch=None, st=None, bs=None, nf=None):
    "A plan of another patch with its strides, of another batch, or of other features"
    res = Plan(plan, reasons=plan.reasons)
    if patch: res.update(patch=tuple(patch), strides=[tuple(s[a] for a in axes) for s in st], depth=len(st)+1)
    if bs: res['bs'] = bs
    if nf: res['nf'] = nf
    return res

def _smaller_plans(plan, sp, axes, given):
    "Plans from this one down to the smallest; nothing in `given` is changed"
    res,st = [plan],_strides(plan.patch, sp, axes)
    def smaller_patches(least):
        nonlocal st
        while 'patch' not in given and math.prod(res[-1].patch)>least:
            p,st = _shrunk(list(res[-1].patch), st, sp, axes)
            if tuple(p)==res[-1].patch: return
            res.append(_resized(res[-1], axes, p, st))
    least = 2 if plan.ndim==3 else 8
    while 'bs' not in given and res[-1].bs>least: res.append(_resized(res[-1], axes, bs=max(least, res[-1].bs//2)))
    smaller_patches(40**3 if plan.ndim==3 else 96**2)
    if 'nf' not in given and plan.nf>=16: res.append(_resized(res[-1], axes, nf=plan.nf//2))
    smaller_patches(24**3 if plan.ndim==3 else 48**2)
    return res

def fit_plan(
    sizes,         # plans, the largest first
    minutes:float, # of training and validation
    machine:dict,  # of `measure_machine`
    n_in:int=1     # channels of the network's input
)->Plan:           # one of them, with `minutes`, `updates`, `fast` and `machine`
    "The largest plan that gives `UPDATES` in its time, or the smallest, with the reason"
    counts = [updates_in(minutes, update_seconds(p, machine, n_in)) for p in sizes]
    i = first(i for i,n in enumerate(counts) if n>=UPDATES)
    i = len(sizes)-1 if i is None else i
    p,rate = sizes[i],machine['seconds'][str(sizes[i].nf)]
    fast = rate['fast']<=1.1*rate['plain']
    why = dict(sizes[0].reasons)
    for k in ('patch','bs','nf'):
        if p[k]!=sizes[0][k]:
            why[k] = f"{sizes[0][k]} fits the memory, but would give {counts[0]} updates in {minutes:g} minutes"
    why.update(minutes='of training, given', updates='expected, of this machine' if counts[i]>=UPDATES
               else f'expected, of this machine: fewer than {UPDATES}, so give it more minutes',
               fast=f"channels-last{' and bfloat16' if machine['bf16'] else ''} {'is' if fast else 'is not'} as fast: "
                    f"{1/rate['fast']:.0f} GFLOP/s, plain float32 {1/rate['plain']:.0f}", machine='measured')
    return Plan({**p, 'minutes':minutes, 'updates':counts[i], 'fast':fast, 'machine':machine}, reasons=why)


# %% [markdown]
# ## `suggest_plan`

# %%
#| export
def suggest_plan(
    df,                   # one row a case, with `image_col`; the training cases
    ndim:int=3,           # 3: volumes, 2: slices
    image_col='image',    # column (or columns: channels) of the image files
    path='.',             # stands before relative file names
    memory:float=None,    # GiB for a training step; default: `default_memory`
    spacing='auto',       # None, mm, or 'auto'
    orientation='RAS',    # order of the axes
    patch='auto',         # voxels, `ndim` of them, or 'auto'
    bs:int=None,          # batch size
    axis='auto',          # slices (`ndim=2`): array axis that is cut across, 0 to 2
    context:int=0,        # slices: neighbours on each side that become channels
    samples_per_case='auto', # patches drawn of each case in an epoch
    nf:int=None,          # features of the first level
    device=None,          # device that the budget is for
    # of training: the machine is measured, and what would give fewer than `UPDATES` is made smaller; None: memory alone
    # decides
    minutes:float=None,
    machine:dict=None,    # with `minutes`: what `measure_machine` gave; None: it is measured now
    heads=None            # what `read_header` says of each case, where it was read already
)->Plan:                  # spacing, axis, patch, strides, depth, nf, bs, samples_per_case, …, each with its reason
    "Spacing, patch, batch, depth and strides from the data, a memory budget and a time budget, each with its reason. Source of the idea: nnU-Net (Isensee 2021)"
    if minutes is not None and not (isinstance(minutes, (int,float)) and 0<minutes<math.inf):
        raise InputError(f"minutes: expected a number above 0, or None; found {minutes!r}")
    fixed = [k for k,v in dict(patch=patch, bs=bs, nf=nf).items() if not (v is None or isinstance(v, str))]
    if ndim not in (2,3): raise InputError(f"ndim: expected 2 or 3; found {ndim}")
    for k,v,least in (('bs',bs,1), ('samples_per_case',samples_per_case,1), ('context',context,0)):
        if not (v is None or v=='auto' or isinstance(v, (int,np.integer)) and v>=least):
            raise InputError(f"{k}: expected a whole number of {least} or more; found {v!r}")
    if axis not in ('auto',0,1,2): raise InputError(f"axis: expected array axis 0, 1 or 2, or 'auto'; found {axis!r}")
    device = torch.device(ifnone(device, default_device()))
    why = {}
    mem = ifnone(memory, default_memory(device))
    why['memory'] = 'given' if memory is not None else f'GiB for a training step on {device.type}'
    pre = Preprocess(spacing=spacing, orientation=orientation)
    if heads is None: heads = [read_header(o) for o in all_files(df, image_col, path)]
    oriented = [pre.oriented(h['shape'], h['affine']) for h in heads]
    if spacing=='auto':
        pre.spacing = auto_spacing([spacing_of(a) for _,a in oriented])
        why['spacing'] = f'mm; the median of {len(heads)} cases'
    else: why['spacing'] = 'given' if spacing is not None else "each case keeps its own"
    grids = [pre.grid(h['shape'], h['affine']) for h in heads]
    med = np.median([s for s,_ in grids], 0)
    sp = np.median([spacing_of(a) for _,a in grids], 0)
    if ndim==2:
        thin = [a for a,p in enumerate(patch) if p==1] if is_listy(patch) and len(patch)==3 else []
        if len(thin)==1:
            if axis not in ('auto', thin[0]):
                raise InputError(f"patch {tuple(patch)} is a slice across axis {thin[0]}, and axis={axis} was asked "
                                 f"for. Leave one of them out")
            axis = thin[0]
        if axis=='auto':
            near = np.flatnonzero(sp>=.95*sp.max())
            # the first of nearly equal sides
            axis = int(next(a for a in near if med[a]*sp[a]<=1.1*min(med[b]*sp[b] for b in near)))
            why['axis'] = (
                    f"across the {'coarsest spacing' if len(near)<3 else 'shortest side'}, so that a slice shows most")
        else: why['axis'] = 'given'
        axes = [a for a in range(3) if a!=axis]
    else: axis,axes = None,[0,1,2]
    if nf is None:
        nf = 16 if ndim==3 and device.type=='cpu' else 32
        why['nf'] = 'features of the first level'+(': 16 for volumes on a CPU' if nf==16 else '')
    else: why['nf'] = 'given'
    def fits(p, b): return np.prod([p[a] for a in axes])*b*nf*BYTES<=mem*2**30
    if patch=='auto':
        p,st = _whole_scan(med, sp, axes)
        while not fits(p, 2 if ndim==3 else 4) and max(p)>8:
            q = _shrunk(p, st, sp, axes)
            if q[0]==p: break
            p,st = q
        whole,shrunk = tuple(int(o) for o in med),tuple(p)<tuple(_whole_scan(med, sp, axes)[0])
        why['patch'] = (
                f"voxels; the median case has {whole}, shrunk to the budget, rounded up to what the strides divide"
                if shrunk
                        else f"voxels; holds the median case {whole}")
    else:
        p = [1]*3
        given = list(patch) if is_listy(patch) else [patch]*len(axes)
        if len(given)==3 and ndim==2: given = [given[a] for a in axes]
        if len(given)!=len(axes) or min(given)<1:
            raise InputError(f"patch: expected {len(axes)} sizes for ndim={ndim}; found {patch}")
        for a,g_ in zip(axes, given): p[a] = int(g_)
        st = _dividing_strides(p, sp, axes)
        why['patch'] = 'given'
    if bs is None:
        least,most = (2,4) if ndim==3 else (4,32)
        bs = min(most, max(least, int(mem*2**30//(np.prod([p[a] for a in axes])*nf*BYTES))))
        why['bs'] = f'as many as fit the budget, at most {most}'
    else: why['bs'] = 'given'
    auto_samples = samples_per_case=='auto'
    if auto_samples:
        samples_per_case = _samples(bs, len(heads))
        why['samples_per_case'] = 'at least 64 batches an epoch'
    else: why['samples_per_case'] = 'given'
    strides = [tuple(s[a] for a in axes) for s in st]
    why['strides'] = 'each axis is halved while 4 voxels are left and it is not over twice as coarse as the finest'
    why['depth'] = 'levels: one more than the strides'
    d = dict(ndim=ndim, spacing=pre.spacing, patch=tuple(p), strides=strides, depth=len(strides)+1, nf=nf, bs=bs,
             samples_per_case=samples_per_case, memory=mem, orientation=orientation)
    if ndim==2:
        d.update(axis=axis, context=context)
        why['context'] = 'neighbouring slices on each side, as channels'
    plan = Plan(d, reasons=why)
    if minutes is None: return plan
    sizes = [Plan({**o, 'samples_per_case':_samples(o.bs, len(heads))}, reasons=why) if auto_samples else o
                   for o in _smaller_plans(plan, sp, axes, fixed)]
    n_in = heads[0]['channels']*(1+2*context if ndim==2 else 1)
    if machine is None: machine = measure_machine(ndim, {o.nf for o in sizes}, n_in, device)
    return fit_plan(sizes, minutes, machine, n_in)


# %%
if os.environ.get('FASTMED_DATA'):
    from fastmed.data.cases import scan_decathlon
    hip = scan_decathlon(Path(os.environ['FASTMED_DATA'])/'hippocampus').head(60)
    plan = suggest_plan(hip, device='cpu')
    test_eq(plan.patch, (40,56,40))
    test_eq((plan.depth, plan.bs, plan.nf), (4,4,16))
    p2 = suggest_plan(hip, ndim=2, device='cpu')
    test_eq((p2.axis, p2.patch, p2.depth, p2.bs), (0, (1,56,40), 4, 32))
    display(plan)

# %% [markdown]
# The same rules on a cervical spine, 0.5×0.5×7.5 mm: the thick axis is never halved, and 2D slices are cut across it.

# %%
if os.environ.get('FASTMED_DATA'):
    spine = pd.DataFrame(dict(image=[Path(os.environ['FASTMED_DATA'])/'spine/t2s.nii.gz']))
    p = suggest_plan(spine, ndim=3, device='cpu')
    test_eq({s[2] for s in p.strides[:3]}, {1})
    print(p)
    print()
    print(suggest_plan(spine, ndim=2, device='cpu'))


# %% [markdown]
# The same data and two minutes, on three machines of given speed (so that this page does not depend on the one that prints it). The fastest keeps the plan of memory alone:

# %%
def machine(gflops, bf16=False):
    return dict(device='cpu', bf16=bf16, threads=2,
                seconds={str(nf):dict(fast=1/gflops, plain=(3 if bf16 else 1)/gflops) for nf in (4,8,16,32)})
from fastmed.data.datasets import phantom
tmp = Path(tempfile.mkdtemp())
phantom((80,96,80), np.diag([2,2,2,1.]))[0].to_filename(tmp/'brain.nii.gz')
brain = pd.DataFrame(dict(image=[tmp/'brain.nii.gz']))
plans = {(nd,g):suggest_plan(brain, nd, device='cpu', minutes=2, machine=machine(g)) for nd in (3,2)
                             for g in (60,300,5000)}
pd.DataFrame([dict(ndim=nd, gflops=g, **{k:p[k] for k in ('patch','bs','nf','updates')}) for (nd,g),p in plans.items()])

# %% [markdown]
# Each line of the slow machine's plan says why it is so:

# %%
plans[3,60]

# %%
#| hide
for nd in (3,2):
    free = suggest_plan(brain, nd, device='cpu')
    assert 'updates' not in free and 'fast' not in free
    test_eq({k:plans[nd,5000][k] for k in free}, dict(free))
    for g in (60,300,5000): assert plans[nd,g].updates>=UPDATES
    q = Plan.from_json(plans[nd,60].to_json())
    test_eq(dict(q), dict(plans[nd,60]))
    test_eq(q.reasons, plans[nd,60].reasons)
p = suggest_plan(brain, 3, device='cpu', patch=(48,48,48), bs=3, nf=16, minutes=2, machine=machine(60))
test_eq((p.patch, p.bs, p.nf), ((48,48,48),3,16))
assert p.updates<UPDATES and 'more minutes' in p.reasons['updates']
test_fail(lambda: suggest_plan(brain, minutes=0), contains='above 0')
