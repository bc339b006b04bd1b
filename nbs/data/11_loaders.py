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
# # loaders
#
# > fastai's DataBlock and DataLoaders for volumes and slices: from a table of files to batches of patches.

# %%
#| default_exp data.loaders

# %% [markdown]
# A person who knows fastai should find nothing new here: `VolumeBlock` and `VolumeMaskBlock(codes)` go into a plain `DataBlock`, and
# `VolumeDataLoaders.from_df(df)` does it in one line. What is new happens inside. A case is preprocessed once and kept; an item is a memory-mapped scan
# with its mask; the last item transform cuts a patch out of both. **A slice is a patch of thickness one**, so 2D goes the same way with one axis less.

# %%
#| export
from pathlib import Path

import numpy as np
import torch
from fastai.data.all import (
    DataBlock, DataLoaders, default_device, defaults, dispatch, TensorCategory, TensorMultiCategory, ToTensor, warn
)
from fastcore.all import delegates, first, ifnone, is_listy, L, patch
from fastmed.core import (
    InputError, ResourceError, show_plane, TensorSlice, TensorSliceMask, TensorVolume, TensorVolumeMask
)
from fastmed.data.augment import volume_tfms
from fastmed.data.blocks import (
    CaseFiles, get_store, PartialPatchDL, PatchTransform, SliceBlock, SliceMaskBlock, VolumeBlock, VolumeMaskBlock,
    WeightedPatchDL
)
from fastmed.data.cases import (
    case_at, case_splitter, check_codes, check_columns, scan_decathlon, scan_folder, warn_twins
)
from fastmed.data.labels import (
    fitted_shape, label_block, label_splitter, TensorRegression, whole_plan, WholeTransform
)
from fastmed.data.plan import suggest_plan
from fastmed.data.preprocess import all_files, Plan, Preprocess
from fastmed.data.recipe import labels_of
from fastmed.data.store import cache_dir, kept_digest, kept_found, label_values, Store
from fastmed.io.guard import memory_left
from fastmed.io.volumes import describe_grid, read_header, same_grid, unlike_grids
from torch import Tensor

# %%
from fastmed.data.cases import *
from fastai.data.all import *

# %%
#| hide
from fastcore.test import *
import os, tempfile
import fastprogress
fastprogress.fastprogress.NO_BAR = True
tmp = Path(tempfile.mkdtemp())


# %% [markdown]
# ## The cases of a table

# %%
#| exporti
class CaseTable:
    "The cases that DataLoaders are made of: rows, files and headers, each read once, and which of them train"
    def __init__(self,
        df,         # one row a case
        path,       # stands before relative names
        image_col,  # column, or several: channels
        mask_col,   # column, or None
        cache=None  # folder of the store; default: `cache_dir()`
    ):
        root = Path(path).absolute()                              # whatever folder the process is in later
        self.df,self.path,self.image_col,self.mask_col = df,path,image_col,mask_col
        self.cache = Path(cache_dir() if cache is None else cache)
        self.images = all_files(df, image_col, root)
        self.masks = [] if mask_col is None else all_files(df, mask_col, root)
        for m in self.masks:
            if is_listy(m): raise InputError(f"mask_col {mask_col!r}: expected one file a case; found {m}")

    def split(self,
        splitter # items → (training, validation) indices
    ):           # self
        "Say which cases train; warns where an image stands on both sides"
        self.splitter,self.train = splitter,list(splitter(range(len(self.df)))[0])
        warn_twins(self.df, self.images, self.train)
        return self

    def of_training(self, values): return [values[i] for i in self.train]

# %% [markdown]
# The headers of all cases are read before any voxel is: image and mask must lie on one grid, and each case must have the same channels.

# %%
#| exporti
def _kept_header(fn, cache):
    "`read_header`, from the store where the files are those of the last time"
    return kept_found('header', list(L(fn)), cache, None, lambda: read_header(fn))

def _check_same_place(case, image, mask, heads):
    "Raise `InputError` where image and mask of a case lie on unlike grids, by their headers"
    of_image,of_mask = [Preprocess().oriented(h['shape'], h['affine']) for h in heads]
    if same_grid(*of_image, *of_mask): return
    found = [f"{f}: {describe_grid(h['shape'], h['affine'])}" for f,h in zip((first(L(image)),mask), heads, strict=True)]
    raise InputError(f"case {case!r}: image and mask {unlike_grids(*found)}")

def _check_channels(df, heads):
    "Raise `InputError` where a case has another number of channels than the first"
    n = heads[0]['channels']
    for i,h in enumerate(heads):
        if h['channels']!=n:
            raise InputError(f"case {case_at(df, 0)!r} has {n} channels, case {case_at(df, i)!r} has {h['channels']}: "
                             f"expected the same number in every case. Leave channels out with image_col=[…], or the "
                             f"case")

@patch
def read_headers(self:CaseTable): # self
    "What `read_header` says of each image, held against its mask. Raises `InputError`, naming the case"
    self.heads = []
    for i,fn in enumerate(self.images):
        head = _kept_header(fn, self.cache)
        if self.masks:
            heads = head,_kept_header(self.masks[i], self.cache)
            _check_same_place(case_at(self.df, i), fn, self.masks[i], heads)
        self.heads.append(head)
    _check_channels(self.df, self.heads)
    return self

# %%
#| exporti
def _codes_from(values):
    "Names for the values of masks. Raises `InputError` where they are not 0, 1, 2 …"
    if values!=list(range(len(values))):
        raise InputError(f"The masks hold the values {values[:12]}{' …' if len(values)>12 else ''}: expected 0, 1, 2 … "
                         f"without a gap. Declare them: codes={{'background':0, 'lesion':255}}, or the list of names "
                         f"for 0,1,2…")
    if len(values)<2:
        raise InputError("The masks hold nothing but background (0). Check that they are the right files, or declare "
                         "codes=['background', …]")
    return ['background']+[str(v) for v in values[1:]]

@patch
def fitted(self:CaseTable,
    pre          # `Preprocess` as it was asked for
)->Preprocess:   # fitted on the training cases, with codes
    "Fill in codes and statistics; kept in the store, so that the same cases are measured once"
    if pre.codes is None and self.masks:
        pre.codes = check_codes(self.df.attrs.get('codes'))
        if pre.codes is None: pre.codes = _codes_from(label_values(Store(pre, self.cache), self.masks))
    images,masks = self.of_training(self.images),self.of_training(self.masks) if self.masks else []
    digests = [[kept_digest(f, self.cache) for f in L(o)] for o in images+masks]
    found = Store(pre, self.cache).cached('fit', dict(files=digests, pre=pre.to_dict()),
                                          lambda: pre.fit(images, masks or None).to_dict())
    return Preprocess(**found)

# %% [markdown]
# What is asked for is held against each other first, so that no argument is dropped without a word.

# %%
#| exporti
def _check_plan(ndim, plan, given):
    "Raise `InputError` where a plan is none, or does not go together with the other arguments"
    auto = dict(patch='auto', bs=None, samples_per_case='auto', spacing='auto', axis='auto', context=0, minutes=None)
    said = [k for k,v in given.items() if type(v) is not type(auto[k]) or v!=auto[k]]
    if said:
        raise InputError(f"plan: it says {', '.join(said)} already. Leave {'it' if len(said)==1 else 'them'} out, or "
                         f"change the plan")
    needed = ('ndim','spacing','orientation','patch','strides','depth','nf','bs','samples_per_case')
    if lacks:=[k for k in needed if k not in plan]:
        raise InputError(f"plan: expected what suggest_plan gives; {', '.join(lacks)} not found")
    if plan['ndim']!=ndim: raise InputError(f"plan: is of {plan['ndim']}D patches, and these DataLoaders are {ndim}D")

def _check_patches(of_labels, foreground):
    "Raise `InputError` where an argument of labels is given without labels, or the foreground is no share"
    if odd:=[k for k,v in of_labels.items() if v is not None]:
        raise InputError(f"{', '.join(odd)}: belongs to labels: say label_col=… too")
    if foreground!='auto' and not 0<=foreground<=1:
        raise InputError(f"foreground: expected a share from 0 to 1; found {foreground}")

def _check_whole(of_patches):
    "Raise `InputError` where an argument of patches is given for whole scans"
    if odd:=[k for k,v in of_patches.items() if v is not None and not (isinstance(v, str) and v=='auto')]:
        raise InputError(f"{', '.join(odd)}: belongs to patches; with a label_col the item is the whole scan, of size=…")

def _check_room(plan, channels):
    "Raise `ResourceError` where a batch alone is larger than the memory"
    voxels = plan.bs*int(np.prod([float(p) for p in plan.patch]))*(1+2*plan.get('context', 0))
    need,left = voxels*(4*channels+1),memory_left()
    if need>left:
        raise ResourceError(f"patch: a batch of {plan.bs} patches of {'×'.join(map(str, plan.patch))} voxels takes "
                            f"{need/1e9:.3g} GB before a network has seen it, and {left/1e9:.3g} GB are free. Give a "
                            f"smaller patch= or bs=")

def _say_larger(cases, pre, plan):
    "Tell which scans have to be made smaller to lie on the plan's grid"
    grids = [pre.grid(h['shape'], h['affine'])[0] for h in cases.heads]
    if big:=[i for i,n in enumerate(grids) if fitted_shape(n, plan)!=tuple(n)]:
        warn(f"{len(big)} of {len(grids)} cases are larger than the {'×'.join(map(str, plan.patch))} voxels of a whole "
             f"scan, such as {case_at(cases.df, big[0])!r} ({'×'.join(map(str, grids[big[0]]))}): they are made "
             f"smaller, not cropped. Say a larger size or spacing to keep their scale")

def _check_asked(ndim, given, plan, label_col, of_labels, foreground):
    "Raise `InputError` where arguments do not go together"
    if label_col is None:
        if plan is not None: _check_plan(ndim, plan, given)
        _check_patches(of_labels, foreground)
    else: _check_whole(dict(minutes=given['minutes'], plan=plan, patch=given['patch'], foreground=foreground))
    if ndim==3 and (given['axis']!='auto' or given['context']):
        raise InputError("axis and context belong to slices: use SliceDataLoaders")

# %% [markdown]
# Split and plan:

# %%
#| exporti
def _splitter(df, labels, split, stratify):
    "How the cases are split: by subject, and evenly where they have labels"
    if labels is None: return case_splitter(df, **split)
    kind = label_block(df, **labels)[2]
    return label_splitter(df, labels['label_col'], kind, labels['label_delim'], stratify=stratify, **split)

def _planned(ndim, cases, plan, labels, size, asked):
    "The plan that was given, or one for the cases of training"
    if plan is not None: return Plan(plan, reasons=getattr(plan, 'reasons', None))
    rows,heads = cases.df.iloc[cases.train],cases.of_training(cases.heads)
    if labels is None: return suggest_plan(rows, ndim, cases.image_col, cases.path, heads=heads, **asked)
    asked = {k:v for k,v in asked.items() if k not in ('patch','minutes')}
    return whole_plan(rows, ndim, cases.image_col, cases.path, size, heads=heads, **asked)

# %% [markdown]
# Last, the `DataBlock`: a block for images, one for masks, one for labels, and the cut.

# %%
#| exporti
def _case_block(ndim, cases, pre, cut, label, item_tfms, batch_tfms):
    "The `DataBlock` of these cases; `label`: (block, getter, kind), or None"
    of_image,of_mask = (VolumeBlock,VolumeMaskBlock) if ndim==3 else (SliceBlock,SliceMaskBlock)
    blocks,get_y = [of_image(pre, cases.cache)],[]
    if cases.masks:
        blocks.append(of_mask(None, pre, cases.cache))
        get_y.append(CaseFiles(cases.mask_col, cases.path))
    if label is not None:
        blocks.append(label[0])
        get_y.append(label[1])
    block = DataBlock(blocks=tuple(blocks), n_inp=1, get_x=CaseFiles(cases.image_col, cases.path), get_y=get_y,
                      splitter=cases.splitter, item_tfms=[cut, *L(item_tfms)], batch_tfms=batch_tfms)
    # everything here is a tensor already
    block.item_tfms = L(f for f in block.item_tfms if not isinstance(f, ToTensor))
    return block

def _augmentation(plan):
    "`volume_tfms` for the spacing of a plan"
    spacing = plan.spacing or (1,1,1)
    return volume_tfms(spacing=tuple(spacing[a] for a in range(3) if plan.ndim==3 or a!=plan.axis))

# %% [markdown]
# ## The DataLoaders
#
# `preprocess`, `plan` and `recipe` are those of every `DataLoaders`, see `recipe`.

# %%
#| export
class VolumeDataLoaders(DataLoaders):
    "DataLoaders of volume patches"
    _ndim = 3
    store = property(get_store)
    labels = property(labels_of)
    @property
    def codes(self): return self.preprocess.vocab                            # of the masks
    @property
    def task(self): return ifnone(self.labels, ('mask',))[0]
    @property
    def vocab(self): return self.labels[1] if self.labels else self.codes
    @property
    def c(self): return len(self.vocab)

    @classmethod
    def from_dblock(cls,
        dblock,   # `DataBlock` with a `VolumeBlock` and a `PatchTransform`
        source,   # what its getters read: a DataFrame, a list of files
        path='.', # the Learner's path
        bs:int=4, # batch size
        **kwargs  # of `DataBlock.dataloaders`
    ):            # these DataLoaders
        "From a `DataBlock` with a `VolumeBlock`"
        dls = dblock.dataloaders(source, path=path, bs=bs, **kwargs)
        return cls(*dls.loaders, path=dls.path, device=dls.device)

class SliceDataLoaders(VolumeDataLoaders):
    "DataLoaders of slices: patches of thickness one, from the same stored volumes"
    _ndim = 2

# %% [markdown]
# `from_df` in steps: check what is asked, find the files, split, plan, prepare, and make the block. All that follows from the data follows from the cases of training.

# %%
#| exporti
@patch(cls_method=True)
def from_df(cls:VolumeDataLoaders,
    df,                        # one row a case
    path='.',                  # stands before relative file names; also the Learner's path
    image_col='image',         # column of the images, or several: channels
    mask_col='auto',           # column of the masks; 'auto': 'mask', or none where there is a `label_col`
    codes=None,                # structures: names, or dict name → value(s) in the file; default: from the data
    group_col=None,            # column whose groups are never parted; default 'subject' where it exists
    valid_col=None,            # bool column: validation cases
    valid_pct=0.2,             # share of validation cases
    seed=42,                   # of the split and of the validation patches
    spacing='auto',            # None: each case's own; mm; or 'auto'
    patch='auto',              # voxels, or 'auto'; with a `label_col` there is `size`
    normalize='auto',          # see `Preprocess`
    bs=None,                   # batch size
    samples_per_case='auto',   # patches of each case in an epoch
    foreground='auto',         # share of patches drawn around a structure; 'auto': a third
    item_tfms=None,            # more item transforms, such as `TorchIOTransform`
    batch_tfms='auto',         # 'auto': `volume_tfms()`; or a list; or None
    cache=None,                # folder of the store; default: `cache_dir()`
    num_workers=None,          # default: 0 on a CPU, which trains on all cores anyway; up to 8 with a GPU
    device=None,               # default: fastai's
    axis='auto',               # slices only: the array axis that is cut across
    context=0,                 # slices only: neighbours on each side, as channels
    label_col=None,            # column of what a case is, or several; the item is then the whole scan
    y_block=None,              # 'category', 'multi', 'regression' or a block of fastai's; default: from the values
    label_delim=None,          # stands between the findings of a text
    size=None,                 # with `label_col`: voxels of the whole scan; default: the largest training case
    stratify=True,             # with `label_col`: each class alike on both sides
    minutes=None,              # of training: the plan gives enough updates in this time, see `suggest_plan`
    plan=None                  # a `Plan` made before, such as that of another fold; nothing is measured then
):                             # these DataLoaders, every case preprocessed and kept
    "From a DataFrame with a row a case. Raises `KeyError` (a column), `ValueError` (a case, named, that cannot be used)"
    given = dict(patch=patch, bs=bs, samples_per_case=samples_per_case, spacing=spacing, axis=axis, context=context,
                 minutes=minutes)
    if not len(df): raise InputError("from_df: the DataFrame has no rows")
    _check_asked(cls._ndim, given, plan, label_col, dict(y_block=y_block, label_delim=label_delim, size=size), foreground)
    df = check_columns(df).reset_index(drop=True)
    if mask_col=='auto': mask_col = 'mask' if label_col is None else None
    cases = CaseTable(df, path, image_col, mask_col, cache)
    labels = None if label_col is None else dict(label_col=label_col, y_block=y_block, label_delim=label_delim)
    split = dict(group_col=group_col, valid_col=valid_col, valid_pct=valid_pct, seed=seed)
    cases.split(_splitter(df, labels, split, stratify))
    label = None if labels is None else label_block(df, train=cases.train, group_col=group_col, **labels)
    cases.read_headers()
    device = torch.device(ifnone(device, default_device()))
    plan = _planned(cls._ndim, cases, plan, labels, size, dict(given, device=device))
    _check_room(plan, cases.heads[0]['channels'])
    pre = cases.fitted(Preprocess(plan.spacing, normalize, plan.orientation, codes))
    if labels is not None: _say_larger(cases, pre, plan)
    Store(pre, cases.cache).build(cases.images, cases.masks)
    if isinstance(batch_tfms, str) and batch_tfms=='auto': batch_tfms = _augmentation(plan)
    cut = PatchTransform(plan, 1/3 if foreground=='auto' else foreground) if label is None else WholeTransform(plan)
    block = _case_block(cls._ndim, cases, pre, cut, label, item_tfms, batch_tfms)
    if num_workers is None: num_workers = 0 if device.type=='cpu' else min(8, defaults.cpus)
    return cls.from_dblock(block, df, path=path, bs=min(plan.bs, len(cases.train)*plan.samples_per_case),
                           samples=plan.samples_per_case, val_samples=-(-plan.samples_per_case//4), seed=seed,
                           num_workers=num_workers, device=device)

# %% [markdown]
# ## Other ways to them

# %%
#| export
@patch(cls_method=True)
@delegates(VolumeDataLoaders.from_df)
def from_folder(cls:VolumeDataLoaders,
    path,                        # folder of the data set
    images:str='images/*.nii.gz',# pattern of the images, below `path`
    masks:str='labels/*.nii.gz', # pattern of the masks
    channels=None,               # files that make a case; see `scan_folder`
    **kwargs
):                               # these DataLoaders
    "From a folder of images and masks paired by name (see `scan_folder`). Raises `MissingFileError` if nothing matches"
    return cls.from_df(scan_folder(path, images, masks, channels), **{'path':Path(path).resolve(), **kwargs})

@patch(cls_method=True)
@delegates(VolumeDataLoaders.from_df)
def from_decathlon(cls:VolumeDataLoaders,
    path,    # folder with `dataset.json`
    **kwargs
):           # these DataLoaders
    "From a task of the Medical Segmentation Decathlon (see `scan_decathlon`). Raises `MissingFileError` without one"
    return cls.from_df(scan_decathlon(path), **{'path':Path(path).resolve(), **kwargs})

# %% [markdown]
# fastai's `weighted_dataloaders` and `partial_dataloaders`, of DataLoaders that are ready:

# %%
#| export
def _training_by(dls, dl_type, **kwargs):
    train = dls.train.new(cls=dl_type, **kwargs)
    return type(dls)(train, *dls.loaders[1:], path=dls.path, device=dls.device)

@patch
def weighted_dataloaders(self:VolumeDataLoaders,
    wgts # one number a case of training, in the order of `train_ds.items`
):       # the same DataLoaders, training cases drawn by weight
    "The training cases drawn by weight. Raises `InputError` on another number of weights than cases"
    return _training_by(self, WeightedPatchDL, wgts=wgts)

@patch
def partial_dataloaders(self:VolumeDataLoaders,
    partial_n:int # patches of an epoch
):                # the same DataLoaders, with so many patches of training an epoch
    "So many patches of training an epoch"
    return _training_by(self, PartialPatchDL, partial_n=partial_n)


# %% [markdown]
# ## Showing a batch

# %%
#| exporti
def axes_grid(
    n,            # pictures
    nrows=None,   # rows, or None
    ncols=None,   # columns; default: at most 4
    figsize=None, # inches of all, or None
    imsize=2.6    # inches of one
):                # n axes without frames
    "Axes for pictures side by side"
    import matplotlib.pyplot as plt
    cols = ifnone(ncols, min(4, n) if nrows is None else -(-n//nrows))
    rows = max(ifnone(nrows, 0), -(-n//cols))
    axs = plt.subplots(rows, cols, figsize=ifnone(figsize, (cols*imsize, rows*imsize)), squeeze=False)[1].flatten()
    for a in axs: a.set_axis_off()
    return axs[:n]


# %%
#| exporti
def _colour(label, predicted, true):
    "Of a title: numbers are neither right nor wrong"
    if isinstance(label, Tensor): return 'black'
    return 'green' if predicted==true else 'red'

def show_labelled(
    samples,  # of a batch
    outs,     # predictions, or None
    ctxs,     # axes, or None
    max_n,    # pictures at most
    **kwargs  # of `show`
):            # the axes
    "Items with their labels; a wrong prediction is red"
    for s,o,c in zip(samples, outs, ctxs, strict=False):
        t = label_text(s[-1])
        p = None if o is None else label_text(o[-1])
        s[0].show(ctx=c, mask=s[1] if len(s)>2 else None, **{'title':t if p is None else f'{t}\n{p}', **kwargs})
        if p is not None: c.title.set_color(_colour(o[-1], p, t))
    return ctxs


# %%
#| export
def _axes_of(ctxs, samples, max_n, nrows, ncols, figsize):
    "The axes that were given, or a grid of them, as fastai's `nrows`, `ncols` and `figsize` (inches) say"
    return axes_grid(min(len(samples), max_n), nrows, ncols, figsize) if ctxs is None else ctxs

def _show(samples, outs, ctxs, max_n, **kwargs):
    for s,o,c in zip(samples, outs, ctxs, strict=False): show_plane(s[0], s[1], pred=o, ctx=c, **kwargs)
    return ctxs

def label_text(
    y # decoded label: `Category`, `MultiCategory`, `TensorRegression`
)->str: # on one line
    "A label in words"
    if isinstance(y, Tensor): return ', '.join(f'{float(o):.4g}' for o in y.flatten())
    if isinstance(y, (tuple,list,L)):
        return ', '.join(f'{o:.4g}' if isinstance(o, float) else str(o) for o in y) or 'none'
    return str(y)

@dispatch
def show_batch(x:TensorVolume|TensorSlice, y:TensorVolumeMask|TensorSliceMask, samples, ctxs=None, max_n=8, nrows=None,
               ncols=None, figsize=None, **kwargs):
    "One picture an item: a plane of the patch with the contours of its mask; `kwargs` go to `show_plane`"
    return _show(samples, [None]*len(samples), _axes_of(ctxs, samples, max_n, nrows, ncols, figsize), max_n, **kwargs)

@dispatch
def show_results(x:TensorVolume|TensorSlice, y:TensorVolumeMask|TensorSliceMask, samples, outs, ctxs=None, max_n=8,
                 nrows=None, ncols=None, figsize=None, **kwargs):
    "One picture an item, truth solid and prediction dashed; `kwargs` go to `show_plane`"
    return _show(samples, [o[0] for o in outs], _axes_of(ctxs, samples, max_n, nrows, ncols, figsize), max_n, **kwargs)

@dispatch
def show_batch(x:TensorVolume|TensorSlice, y:TensorCategory|TensorMultiCategory|TensorRegression|tuple, samples,
               ctxs=None, max_n=8, nrows=None, ncols=None, figsize=None, **kwargs):
    "One picture an item with its label above, and the contours of its mask where it has one"
    return show_labelled(samples, [None]*len(samples), _axes_of(ctxs, samples, max_n, nrows, ncols, figsize), max_n,
                         **kwargs)

@dispatch
def show_results(x:TensorVolume|TensorSlice, y:TensorCategory|TensorMultiCategory|TensorRegression|tuple, samples, outs,
                 ctxs=None, max_n=8, nrows=None, ncols=None, figsize=None, **kwargs):
    "One picture an item, its label above and the prediction below it, green where they agree and red where not"
    return show_labelled(samples, outs, _axes_of(ctxs, samples, max_n, nrows, ncols, figsize), max_n, **kwargs)


# %% [markdown]
# ## On real scans
#
# The hippocampus, from its folder to a batch. (Without `FASTMED_DATA` a few phantoms stand in.)

# %%
from fastmed.data.datasets import phantom
if os.environ.get('FASTMED_DATA'): df = scan_decathlon(Path(os.environ['FASTMED_DATA'])/'hippocampus').head(24)
else:
    rows = []
    for i in range(8):
        for im,f in zip(phantom((35,50,36), seed=i), (tmp/f'{i}.nii.gz', tmp/f'{i}_m.nii.gz')): im.to_filename(f)
        rows.append(dict(case=f'p{i}', subject=str(i//2), image=tmp/f'{i}.nii.gz', mask=tmp/f'{i}_m.nii.gz'))
    df = pd.DataFrame(rows)
dls = VolumeDataLoaders.from_df(df, cache=tmp, device='cpu', samples_per_case=2)
x,y = dls.one_batch()
test_eq(x.shape[1:], (1,)+dls.plan.patch)
test_eq(y.shape[1:], dls.plan.patch)
test_eq((x.affine, y.affine), (None, None))
assert not set(dls.train_ds.items.subject) & set(dls.valid_ds.items.subject)
type(x).__name__, tuple(x.shape), dls.codes, len(dls.train), len(dls.valid)

# %%
dls.show_batch(max_n=4)

# %% [markdown]
# The same cases as slices, with one neighbour on each side:

# %%
dls2 = SliceDataLoaders.from_df(df, cache=tmp, device='cpu', context=1, samples_per_case=4)
x2,y2 = dls2.one_batch()
test_eq(x2.shape[1], 3)
test_eq(y2.ndim, 3)
dls2.show_batch(max_n=4)

# %% [markdown]
# Validation patches are the same every time; training patches are not. Neither depends on the workers.

# %%
b1,b2 = dls.valid.one_batch(),dls.valid.one_batch()
test_eq(b1[0].numpy(), b2[0].numpy())
def batches(nw):
    set_seed(1)
    d = VolumeDataLoaders.from_df(df, cache=tmp, device='cpu', samples_per_case=2, num_workers=nw, batch_tfms=None)
    set_seed(2)
    return [b[0] for b in d.train]
a,b = batches(0),batches(2)
assert all((i==j).all() for i,j in zip(a,b)) and len(a)>1
len(a)

# %%
#| hide
test_fail(lambda: VolumeDataLoaders.from_df(df, splitter=None), contains='splitter')
test_fail(lambda: VolumeDataLoaders.from_df(df, context=1), contains='SliceDataLoaders')
tl = dls.test_dl(df.iloc[:3])
test_eq(len(tl.one_batch()[0]), 3)
tl = dls.test_dl([str(first(L(o))) for o in df.image[:2]])
test_eq(len(tl.one_batch()[0]), 2)
test_eq(len(dls.valid.items), len(dls.valid_ds)*dls.valid.samples)

# %% [markdown]
# And as a plain fastai `DataBlock`:

# %%
block = DataBlock(blocks=(VolumeBlock, VolumeMaskBlock(dls.codes)), get_x=ColReader('image'), get_y=ColReader('mask'),
                  splitter=GroupSplitter(df.subject), item_tfms=PatchTransform((32,32,24)), batch_tfms=volume_tfms())
x,y = block.dataloaders(df, bs=3, device='cpu').one_batch()
test_eq(x.shape, (3,1,32,32,24))
type(y).__name__
