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
# # blocks
#
# > fastai's blocks for volumes and slices: a file becomes a preprocessed tensor, and a patch of it an item.

# %%
#| default_exp data.blocks

# %% [markdown]
# A scan is preprocessed once and kept; an item is a memory-mapped scan with its mask; the last item transform cuts a patch out of both. **A slice is a patch of
# thickness one**, so 2D goes the same way with one axis less. The blocks go into a plain fastai `DataBlock`; `data.loaders` does it in one line.

# %%
#| export
import contextlib
import random
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.all import DataLoaders, Datasets, DisplayedTransform, TfmdDL, TransformBlock, warn
from fastai.vision.augment import RandTransform
from fastcore.all import delegates, first, ifnone, L, patch, store_attr
from fastmed.core import InputError, TensorMed, TensorSlice, TensorSliceMask, TensorVolume, TensorVolumeMask
from fastmed.data.cases import check_columns
from fastmed.data.plan import patch_plan
from fastmed.data.preprocess import case_files, Plan, Preprocess
from fastmed.data.recipe import recipe_parts
from fastmed.data.store import cut, foreground_index, foreground_voxel, random_corner, Store
from fastmed.data.transforms import ActingPipeline, MaskIds
from fastmed.io.volumes import check_same_grid, load_mask, load_volume
from torch import Tensor

# %%
from fastai.data.all import *

# %%
#| hide
from fastcore.test import *
import os, tempfile
tmp = Path(tempfile.mkdtemp())


# %% [markdown]
# ## From a row to typed tensors
#
# `CaseFiles` finds the files of a case in its row; a path that is given instead of a row goes through, which is what makes `dls.test_dl([fn])` work.
# `LoadVolume` and `LoadMask` give the preprocessed scan, out of the store where there is one.

# %%
#| export
class CaseFiles(DisplayedTransform):
    "The files of a case: `cols` of a row, with `path` before them; a path, or a list of them, goes through"
    input_types = (pd.Series, dict, str, Path, list)
    def __init__(self,
        cols='image', # column, or several: channels
        # stands before relative names, and is itself taken from today's folder; None: names stay relative to the folder
        # of each call
        path='.'
    ):
        store_attr()
        if path is not None: self.path = Path(path).absolute()
    def encodes(self, o):
        if not isinstance(o, (pd.Series, dict)): return o
        if isinstance(o, pd.Series): check_columns(o)
        return case_files(o, self.cols, ifnone(self.path, '.'))
    def in_recipe(self): return dict(columns=self.cols)

def warn_parted_subjects(
    items # `TfmdLists` of rows, split
):
    "Warn where a subject of the column `subject` stands on both sides of the split"
    rows,splits = getattr(items, 'items', None),getattr(items, 'splits', ())
    if not isinstance(rows, pd.DataFrame) or 'subject' not in rows or len(splits)<2 or isinstance(splits[0], slice):
        return
    train,*others = [set(rows.subject.iloc[list(s)].dropna().astype(str)) for s in splits]
    both = sorted(train & set().union(*others))
    if both:
        some = ', '.join(map(repr, both[:3]))+(' …' if len(both)>3 else '')
        warn(f"{len(both)} subjects stand on both sides of the split ({some}): the score will be of memory. Say "
             f"splitter=GroupSplitter(df.subject), "
             "or make the DataLoaders by from_df")

class LoadVolume(DisplayedTransform):
    "A file, or a list of channel files, as a preprocessed `TensorVolume`"
    train_setup = False                  # `setups` sees the items of both sides
    def __init__(self,
        preprocess:Preprocess=None, # what happens to the scan; default: RAS order and z-score
        cache=None                  # folder of the store; None: nothing is kept
    ):
        self.preprocess = ifnone(preprocess, Preprocess())
        self.store = Store(self.preprocess, cache) if cache else None
    def setups(self, items): warn_parted_subjects(items)
    def encodes(self, fn): return self.store.image(fn) if self.store else self.preprocess(load_volume(fn))
    def in_recipe(self): return dict(preprocess=self.preprocess, store=self.store)

class LoadMask(DisplayedTransform):
    "A file as a preprocessed `TensorVolumeMask` with its `codes`"
    def __init__(self,
        preprocess:Preprocess=None, # the same as the image's, with the codes
        cache=None                  # folder of the store; None: nothing is kept
    ):
        self.preprocess = ifnone(preprocess, Preprocess())
        self.store = Store(self.preprocess, cache) if cache else None
        self.vocab = self.preprocess.vocab
        if self.vocab: self.c = len(self.vocab)
    def encodes(self, fn):
        if self.store: return self.store.mask(fn)
        t = self.preprocess(load_mask(fn))
        t.fg = foreground_index(t.as_subclass(Tensor).numpy())
        return t
    def in_recipe(self): return dict(codes=self.preprocess.codes)


# %% [markdown]
# ## Cutting the patch
#
# `PatchTransform` is the last item transform. It draws one corner for image and mask. Some patches (`foreground`) are drawn around a voxel of a
# structure, each structure with equal chance. In training the draw is new each epoch; in validation it is fixed, so a validation loss can be compared
# with the one before.
#
# The draw comes from the epoch's seed and the number of the item, not from the state of a worker. So no workers, forked ones and spawned ones give the
# same batches.

# %%
#| export
class PatchTransform(RandTransform):
    "Cut the patch of a plan out of image and mask; in 2D a slice, with its neighbours as channels"
    split_idx = None
    def __init__(self,
        plan,                  # `Plan`, or the patch: three sizes, one of them 1 for slices
        foreground:float=1/3   # share of patches that are drawn around a structure
    ):
        super().__init__()
        self.plan = plan if isinstance(plan, Plan) else patch_plan(plan)
        self.foreground = foreground

    def in_recipe(self): return dict(plan=self.plan)
    def setups(self, dl:TfmdDL):
        if isinstance(dl, PatchDL): return
        raise InputError(f"{type(self).__name__} needs a PatchDL, which keeps validation patches in place; found a "
                         f"{type(dl).__name__}. "
                         "Leave dl_type out, or give a subclass of PatchDL")

    def __call__(self, b, split_idx=None, **kwargs):
        xs = b if isinstance(b, (tuple,list)) else (b,)
        corner = self.corner(xs)
        res = tuple(self.patch(o, corner) if isinstance(o, (TensorVolume,TensorVolumeMask)) else o for o in xs)
        return res if isinstance(b, (tuple,list)) else res[0]

    def corner(self,
        xs        # items of one case: the image, a `TensorVolume`, and its mask
    )->tuple:     # (3,) first voxel, negative where the patch hangs over the edge
        "One draw for the image and mask of an item, from the `draw` that `PatchDL` gave it"
        x,m = xs[0],first(o for o in xs if isinstance(o, TensorVolumeMask))
        if m is not None and isinstance(x, TensorVolume): check_same_grid(x, m)
        seed = getattr(x, 'draw', None)
        rng = np.random.default_rng(seed if seed is not None else torch.randint(2**62, (1,)).item())
        center = foreground_voxel(m.fg, rng) if m is not None and hasattr(m,
                'fg') and rng.random()<self.foreground else None
        return random_corner(x.shape[-3:], self.plan.patch, rng, center)

    def patch(self,
        t,     # `TensorVolume` (C,X,Y,Z) or `TensorVolumeMask` (X,Y,Z)
        corner # (3,) first voxel, from `corner`
    ):         # the same kind in 3D, with its affine; in 2D `TensorSlice` (C,H,W) or `TensorSliceMask` (H,W)
        "Cut the patch that begins at `corner` out of one tensor"
        mask,plan = isinstance(t, TensorVolumeMask),self.plan
        c,size = np.array(corner),list(plan.patch)
        if plan.ndim==2 and not mask and plan.context:
            c[plan.axis] -= plan.context
            size[plan.axis] += 2*plan.context
        # an item of its own: whoever writes into it must not reach the store
        p = cut(t.as_subclass(Tensor), c.tolist(), size).clone()
        if plan.ndim==3:
            aff = t.affine.copy()
            aff[:3,3] += aff[:3,:3]@c
            return TensorVolumeMask(p, affine=aff, codes=getattr(t, 'codes', None)) if mask else TensorVolume(p,
                    affine=aff, meta=getattr(t, 'meta', None))
        if mask: return self._slice(TensorSliceMask(p.select(plan.axis, 0), codes=getattr(t, 'codes', None)), t.spacing)
        return self._slice(TensorSlice(p.movedim(plan.axis+1, 1).flatten(0,1)), t.spacing)

    def _slice(self, t, spacing):
        a,b = [i for i in range(3) if i!=self.plan.axis]
        t.context = self.plan.context
        if spacing: t.aspect = spacing[b]/spacing[a]
        return t

    # a batch carries no geometry; to be shown, an item takes the pipeline's
    def decodes(self, x:TensorVolume):
        if x.affine is None and self.plan.spacing: x.affine = np.diag([*self.plan.spacing,1])
        return x
    def decodes(self, x:TensorVolumeMask):
        if x.affine is None and self.plan.spacing: x.affine = np.diag([*self.plan.spacing,1])
        return x
    def decodes(self, x:TensorSlice): return self._slice(x, self.plan.spacing)
    def decodes(self, x:TensorSliceMask): return self._slice(x, self.plan.spacing)


# %% [markdown]
# ## The DataLoader
#
# `PatchDL` is fastai's `TfmdDL` that visits each case `samples` times an epoch. It clears the metadata of the collated batch: a batch of several scans
# has no single affine, and reading the first one's is how wrong spacings come about.

# %%
#| export
class PatchDL(TfmdDL):
    "A `TfmdDL` that draws `samples` patches of each case in an epoch"
    def __init__(self,
        dataset,       # `Datasets` of cases
        samples:int=1, # patches of each case in an epoch
        seed:int=42,   # of the validation patches
        random:bool=None, # draw anew each epoch; default: where the cases are those of training
        n:int=None,    # patches in an epoch; default: cases times `samples`
        **kwargs       # of `TfmdDL`
    ):
        self.samples,self.seed,self.epoch_seed = samples,seed,seed
        self.random = ifnone(random, getattr(dataset, 'split_idx', None)==0)
        super().__init__(dataset, n=len(dataset)*samples if n is None else n, **kwargs)
        self.after_item,self.after_batch = ActingPipeline(self.after_item),ActingPipeline(self.after_batch)

    def new(self,
        dataset=None, # other cases; None: the same
        cls=None,     # another kind of DataLoader
        **kwargs      # what differs
    ):                # DataLoader like this one
        "Another dataset starts with one patch a case"
        return super().new(dataset, cls, **{'samples':self.samples if dataset is None or dataset is self.dataset else 1,
                                            'seed':self.seed,
                                                'random':self.random if dataset is None or dataset is self.dataset
                                                else None, **kwargs})

    def before_iter(self):
        super().before_iter()
        if self.random: self.epoch_seed = int(torch.randint(2**62, (1,)))

    def create_item(self, s):
        n = len(self.dataset)
        i,k = (s or 0)%n,(s or 0)//n
        it = self.dataset[i]
        x = it[0] if isinstance(it, tuple) else it
        if not isinstance(x, TensorMed): return it
        if self.random: x.draw = (self.epoch_seed, i, k)
        else:                                                        # the same patch of a case, wherever its files lie
            if isinstance(self.dataset.items, pd.DataFrame): k = int(self.dataset.items.iloc[i].get('sample', k))
            names = [Path(o).name for o in L((getattr(x, 'meta', None) or {}).get('fn', ''))]
            x.draw = (self.seed, zlib.crc32(repr(names).encode()), k)
        return it

    def do_item(self,
        s # number of the patch
    ):    # the item, transformed
        "Random item transforms of others draw from torch's state: it follows the item too, so workers change nothing"
        was = torch.get_rng_state()
        # not `torch.manual_seed`: without a GPU that keeps a stack trace of each call, for ever
        try:
            torch.default_generator.manual_seed(zlib.crc32(repr((self.epoch_seed, s)).encode()))
            return super().do_item(s)
        finally: torch.set_rng_state(was)

    def create_batch(self, b):
        res = super().create_batch(b)
        for t in L(res):
            if isinstance(t, TensorMed): t.__dict__.clear()
        return res

    @property
    def items(self):
        "The rows behind each patch, in order, with the number of the `sample`"
        its = self.dataset.items
        if not isinstance(its, pd.DataFrame): return L(list(its)*self.samples)
        return pd.concat([its.assign(sample=k) for k in range(self.samples)]) if self.samples>1 else its


# %%
#| exporti
@contextlib.contextmanager
def chance_kept(
    device, # torch device
    dl=None # DataLoader that draws inside
):
    "Whatever is drawn inside, those outside see the numbers that they would have seen"
    numpy,python,own = np.random.get_state(),random.getstate(),getattr(dl, 'rng', None)
    order = None if own is None else own.getstate()
    with torch.random.fork_rng(devices=[device] if device.type=='cuda' else []):
        try: yield
        finally:
            np.random.set_state(numpy)
            random.setstate(python)
            if own is not None: own.setstate(order)


# %% [markdown]
# ## Cases by weight, and part of an epoch
#
# fastai's `weighted_dataloaders` and `partial_dataloaders` put a DataLoader of their own in the place of the block's. `WeightedPatchDL` and `PartialPatchDL` do the same on
# patches: a weight belongs to a case, and a case that is drawn twice gives two patches.

# %%
#| export
class WeightedPatchDL(PatchDL):
    "A `PatchDL` whose training cases are drawn by weight, as of fastai's `WeightedDL`. Raises `InputError` on another number of weights than cases"
    def __init__(self,
        dataset, # `Datasets` of cases
        wgts=None, # one number a case; None: all alike
        **kwargs # of `PatchDL`
    ):
        self.wgts = None if wgts is None else np.asarray(wgts, dtype=float)
        if wgts is not None and (self.wgts.shape!=(len(dataset),) or not self.wgts.sum()>0 or self.wgts.min()<0):
            raise InputError(f"wgts: expected a number for each of {len(dataset)} training cases, none negative and "
                             f"not all 0; found {len(self.wgts)}")
        super().__init__(dataset, **kwargs)

    def new(self,
        dataset=None, # other cases; None: the same
        cls=None,     # another kind of DataLoader
        **kwargs      # what differs
    ):                # DataLoader like this one
        "Another dataset starts without weights"
        same = (dataset is None or dataset is self.dataset) and issubclass(ifnone(cls, WeightedPatchDL),
                WeightedPatchDL)
        if same: kwargs = {'wgts':self.wgts, **kwargs}
        return super().new(dataset, cls, **kwargs)

    def get_idxs(self):
        if self.wgts is None or not self.shuffle: return super().get_idxs()
        cases = np.random.choice(len(self.dataset), self.n, p=self.wgts/self.wgts.sum())
        # the number of the draw is that of the sample
        return [int(i)+len(self.dataset)*k for k,i in enumerate(cases)]

class PartialPatchDL(PartialDL, PatchDL):
    "A `PatchDL` that draws `partial_n` patches an epoch, as of fastai's `PartialDL`"
    def __init__(self,
        dataset,        # `Datasets` of cases
        partial_n=None, # patches an epoch; None: all
        **kwargs        # of `PatchDL`
    ): super().__init__(dataset, partial_n=partial_n, **kwargs)


# %%
#| export
def _is_patched(dsets):
    "Whether `Datasets` make DataLoaders of patches"
    if not issubclass(dsets._dl_type, PatchDL): return False
    if dsets.split_idx is not None:
        raise InputError("weighted_dataloaders, partial_dataloaders: this is one side of a split. Call them on the "
                         "DataBlock or its Datasets, which hold both")
    return True

@patch
@delegates(Datasets.dataloaders)
def weighted_dataloaders(self:Datasets,
    wgts,        # one number a training case
    bs:int=64,   # batch size
    **kwargs     # of `Datasets.dataloaders`
)->DataLoaders:  # training cases drawn by weight
    "fastai's, of patches where the block says so"
    cls = WeightedPatchDL if _is_patched(self) else WeightedDL
    return self.dataloaders(bs=bs, dl_type=cls, dl_kwargs=({'wgts':wgts}, *[{}]*(self.n_subsets-1)), **kwargs)

@patch
@delegates(Datasets.dataloaders)
def partial_dataloaders(self:Datasets,
    partial_n:int, # items of an epoch; of blocks of ours patches
    bs:int=64,     # batch size
    **kwargs       # of `Datasets.dataloaders`
)->DataLoaders:    # so many items of training an epoch
    "fastai's, of patches where the block says so"
    cls = PartialPatchDL if _is_patched(self) else PartialDL
    return self.dataloaders(bs=bs, dl_type=cls, dl_kwargs=({'partial_n':partial_n}, *[{}]*(self.n_subsets-1)), **kwargs)


# %% [markdown]
# ## Blocks

# %%
#| export
def VolumeBlock(
    preprocess:Preprocess=None, # what happens to the scan; default: RAS order and z-score
    cache=None                  # folder of the store; None: nothing is kept
)->TransformBlock:              # gives a `TensorVolume` (C,X,Y,Z)
    "A `TransformBlock` for image volumes: files (a list of them: channels) become `TensorVolume`s"
    return TransformBlock(type_tfms=[LoadVolume(preprocess, cache)], dl_type=PatchDL)

def VolumeMaskBlock(
    codes=None,                 # structures: list of names, or dict name → value or values in the file
    preprocess:Preprocess=None, # the same as the image's
    cache=None                  # folder of the store; None: nothing is kept
)->TransformBlock:              # gives a `TensorVolumeMask` (X,Y,Z)
    "A `TransformBlock` for label volumes: a file becomes a `TensorVolumeMask` of class ids"
    pre = Preprocess(**{**ifnone(preprocess, Preprocess()).to_dict(), **({} if codes is None else {'codes':codes})})
    return TransformBlock(type_tfms=[LoadMask(pre, cache)], batch_tfms=MaskIds, dl_type=PatchDL)

def SliceBlock(
    preprocess:Preprocess=None, # what happens to the scan; default: RAS order and z-score
    cache=None                  # folder of the store; None: nothing is kept
)->TransformBlock:              # gives a `TensorVolume` (C,X,Y,Z), to be cut
    "A `TransformBlock` for slices of volumes, or for 2D images: a volume that `PatchTransform` cuts to `TensorSlice`s"
    return VolumeBlock(preprocess, cache)

def SliceMaskBlock(
    codes=None,                 # structures: list of names, or dict name → value or values in the file
    preprocess:Preprocess=None, # the same as the image's
    cache=None                  # folder of the store; None: nothing is kept
)->TransformBlock:              # gives a `TensorVolumeMask` (X,Y,Z), to be cut
    "A `TransformBlock` for the masks of slices: a label volume that `PatchTransform` cuts to `TensorSliceMask`s"
    return VolumeMaskBlock(codes, preprocess, cache)


# %% [markdown]
# ## What the transforms know
#
# fastai keeps transforms when a Learner is exported, and forgets attributes that were hung on the DataLoaders. So each transform tells its part of the
# recipe (`in_recipe`), and `dls.recipe`, `dls.preprocess` and `dls.plan` read them, in any DataLoaders, ours or plain.

# %%
#| exporti
def find_transform(
    tfms, # a Pipeline
    cls   # type of the transform
):        # the first one of that type, or None
    "A transform by its type"
    return first(f for f in getattr(tfms, 'fs', L()) if isinstance(f, cls))


# %%
#| export
def get_preprocess(
    dls # DataLoaders with a `VolumeBlock`
)->Preprocess: # fitted
    "`dls.preprocess`, under its older name"
    return dls.preprocess

def get_store(
    dls # DataLoaders with a `VolumeBlock`
)->Store: # or None, where nothing is kept
    "The `Store` of the images"
    return first(o['store'] for o in recipe_parts(dls) if 'store' in o)

def get_plan(
    dls # DataLoaders with a `PatchTransform`
)->Plan: # with patch, ndim, spacing, …
    "`dls.plan`, under its older name"
    return dls.plan


# %%
#| exporti
def check_one_input(
    dls, # DataLoaders
    who  # of the factory
):
    "Raise `InputError` where a network would be given several inputs: whole scans are predicted from one"
    n = getattr(dls, 'n_inp', 1)
    if n!=1:
        raise InputError(f"{who}: these DataLoaders give the network {n} inputs (n_inp={n}), and a scan is predicted "
                         f"from one. Say DataBlock(…, n_inp=1) where masks and labels "
                              "are targets; several scans of a case are channels of one input: "
                              "get_x=CaseFiles(['t1','t2'])")


# %% [markdown]
# A phantom through a plain `DataBlock`, cut to patches of 16 voxels:

# %%
from fastmed.data.datasets import phantom
from fastmed.data.cases import GroupSplitter
rows = []
for i in range(4):
    for im,f in zip(phantom((24,30,20), seed=i), (tmp/f'{i}.nii.gz', tmp/f'{i}_m.nii.gz')): im.to_filename(f)
    rows.append(dict(case=f'p{i}', subject=str(i//2), image=tmp/f'{i}.nii.gz', mask=tmp/f'{i}_m.nii.gz'))
df = pd.DataFrame(rows)
block = DataBlock(blocks=(VolumeBlock, VolumeMaskBlock(['background','large','small'])), get_x=ColReader('image'),
        get_y=ColReader('mask'),
                  splitter=GroupSplitter(df.subject), item_tfms=PatchTransform((16,16,16)))
dls = block.dataloaders(df, bs=2, device='cpu')
x,y = dls.one_batch()
test_eq(x.shape, (2,1,16,16,16))
test_eq(y.shape, (2,16,16,16))
dls.recipe

# %% [markdown]
# The same block, with every other case drawn three times as often:

# %%
weighted = block.weighted_dataloaders(df, [3,1,3,1], bs=2, samples=2, device='cpu', num_workers=0)
test_eq(weighted.one_batch()[0].affine, None)                       # patches, as before
np.random.seed(0)
drawn = [i%len(weighted.train_ds) for _ in range(50) for i in weighted.train.get_idxs()]
share = np.bincount(drawn)/len(drawn)
assert .65<share[0]<.85
share
