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
# # transforms
#
# > fastai's own transforms on slices and radiographs: those that are sound work, the others are refused by name.

# %%
#| default_exp data.transforms

# %% [markdown]
# fastai decides by the type of a tensor whether a transform acts on it, and a transform that knows none of the types of an item leaves it as it is, without a word.
# Slices and radiographs are not of fastai's types, since their values are no colours from 0 to 255. So `aug_transforms()` would be accepted and change nothing. This
# module teaches fastai's transforms our two-dimensional types, where what they do is sound, and has every other transform refused that can act on nothing.

# %%
#| export
from fastmed.core import ArgumentError, TensorMed, TensorSlice, TensorSliceMask, TensorVolume, TensorVolumeMask
from fastai.data.core import Pipeline
from fastai.data.transforms import IntToFloatTensor, ToTensor
from fastai.torch_core import TensorImage, TensorMask, retain_meta
from fastai.vision.augment import AffineCoordTfm, LightingTfm, RandomErasing, RandomResizedCropGPU, RandTransform, Saturation
from fasttransform import ItemTransform, Transform, compose_tfms
from functools import partial
from types import MethodType
from plum import NotFoundLookupError
import torch
from torch import Tensor

# %%
#| hide
from fastcore.test import *
from fastai.vision.all import *


# %% [markdown]
# ## Turned, zoomed, warped, mirrored
#
# A picture is shown with its rows from top to bottom. The array of a slice has the scan's axes instead, X before Y, and `show` draws X from left to right. What is "horizontal" to
# fastai's `Flip` is meant as it is shown, so a slice is turned to rows and columns, moved, and turned back. The mask of an item goes the way of its image, and takes the nearest value.
#
# A network of ours predicts on the grid of the scan, and no batch transform is run then. A transform that gives batches of another size would train on another scale than it predicts on, so it is refused.

# %%
#| exporti
def _families(classes):
    "The classes and all that were derived from them: each has a dispatch of its own"
    return [o for c in classes for o in [c, *_families(c.__subclasses__())]]

def _teaches(*classes):
    "Decorator: an `encodes` for these classes of fastai's and all that were derived from them"
    def add(encodes):
        encodes.__name__ = 'encodes'                    # by which fastai's classes take it
        for c in _families(classes): c(encodes)
        return encodes
    return add

def _check_batch(t, x):
    if x.ndim!=4:
        raise ArgumentError(f"{type(t).__name__} works on whole batches: give it in batch_tfms, not in item_tfms; "
                            f"found one item {tuple(x.shape)}")

def _check_size(t, x):
    size = t.size if t.size is None or isinstance(t.size, (tuple,list)) else (t.size, t.size)
    if size is not None and tuple(size)!=tuple(x.shape[-2:]):
        raise ArgumentError(f"{type(t).__name__}: size={t.size!r} is not that of the items, {tuple(x.shape[-2:])}. The "
                            f"network predicts at the size that the DataLoaders "
                            "were made for: leave size out here, and say patch= (slices) or size= (radiographs) there")

def _as_shown(t, x):
    "`x` with its rows before its columns; the mask of an item follows the image before it"
    if isinstance(x, TensorSlice): t.rows_first = x.rows_first
    return x if getattr(t, 'rows_first', False) else x.transpose(-1,-2)

def _put_back(out, rows, x):
    "What became of `rows`, laid out and typed as `x`"
    out = out.as_subclass(Tensor)
    if rows is not x: out = out.transpose(-1,-2)
    return retain_meta(x, out.to(x.dtype).contiguous().as_subclass(type(x)))

def _moved_batch(t, x, kind, mode):
    if t.split_idx: return x                                          # validation: fastai moves nothing there
    h,w = x.shape[-2:]
    rows,mat = _as_shown(t, x),t.mat.as_subclass(Tensor).clone()
    if rows is not x:                                                 # fastai made the matrix for h by w
        mat[:,0,1] *= (w/h)**2
        mat[:,1,0] *= (h/w)**2
    coords = partial(compose_tfms, tfms=t.coord_fs) if len(t.coord_fs) else None
    return _put_back(kind.affine_coord(rows.as_subclass(Tensor).as_subclass(kind), mat, coords, None, mode, t.pad_mode,
                                       t.align_corners), rows, x)

@_teaches(AffineCoordTfm)
def _move_image(self, x:TensorSlice):
    _check_batch(self, x)
    _check_size(self, x)
    return _moved_batch(self, x, TensorImage, self.mode)

@_teaches(AffineCoordTfm)
def _move_mask(self, x:TensorSliceMask): return _moved_batch(self, x, TensorMask, self.mode_mask)


# %%
def marked(n=2, shape=(1,12,20)):
    "Slices whose mask is where they are bright"
    m = torch.zeros(n, *shape[-2:], dtype=torch.long)
    m[:, 2:5, 12:18] = 1
    return TensorSlice(m[:,None].float().expand(n, *shape).clone()*3-1), TensorSliceMask(m)

set_seed(0)
x,y = marked()
flipped = Flip(p=1.)((x,y), split_idx=0)
# left and right of the picture are the first axis of a slice
test_close(flipped[0], x.flip(-2))
test_eq(flipped[1], y.flip(-2))
for t in (Rotate(30, p=1.), Zoom(min_zoom=1.2, max_zoom=1.5, p=1.), Warp(.4, p=1.), Dihedral(p=1., draw=3), Flip(p=1.)):
    a,b = t((x,y), split_idx=0)
    test_eq((type(a), type(b), b.dtype), (TensorSlice, TensorSliceMask, y.dtype))
    assert not torch.equal(b, y) and (((a[:,0]>.5)==(b==1)).float().mean()>.95)   # image and mask together
    test_eq(t((x,y), split_idx=1)[0], x)
test_fail(lambda: Rotate(size=64)((x,y), split_idx=0), contains='leave size out')
test_fail(lambda: Rotate()((x[0],y[0]), split_idx=0), contains='give it in batch_tfms')
flipped[0].shape


# %% [markdown]
# `RandomResizedCropGPU` cuts out a part and brings it to the size of the patch: a zoom whose sides may differ. At validation the whole item stays, since a prediction sees the whole item too.

# %%
#| exporti
def _cropped(t, x, kind, mode):
    return _put_back(t._encode(x.as_subclass(Tensor).as_subclass(kind), mode), x, x)

@_teaches(RandomResizedCropGPU)
def _crop_image(self, x:TensorSlice):
    _check_batch(self, x)
    _check_size(self, x)
    if self.valid_scale!=1:
        raise ArgumentError(f"RandomResizedCropGPU: valid_scale={self.valid_scale} would crop at validation what a "
                            f"prediction sees whole; leave it at 1")
    h,w = x.shape[-2:]
    if not self.ratio[0]<=w/h<=self.ratio[1]:
        raise ArgumentError(f"RandomResizedCropGPU: at validation ratio={self.ratio} would cut items of {h} by {w}, "
                            f"which a prediction sees whole; say a ratio= that holds {w/h:.3g}")
    return _cropped(self, x, TensorImage, self.mode)

@_teaches(RandomResizedCropGPU)
def _crop_mask(self, x:TensorSliceMask): return _cropped(self, x, TensorMask, self.mode_mask)



# %%
set_seed(0)
a,b = RandomResizedCropGPU((12,20), min_scale=.3, ratio=(1.,2.))((x,y), split_idx=0)
test_eq(a.shape, x.shape)
assert ((a[:,0]>.5)==(b==1)).float().mean()>.95 and not torch.equal(b, y)
a,b = RandomResizedCropGPU((12,20), ratio=(1.,2.))((x,y), split_idx=1)
test_close(a, x, 1e-5)
test_eq(b, y)
test_fail(lambda: RandomResizedCropGPU((12,20))((x,y), split_idx=0), contains='ratio')
test_fail(lambda: RandomResizedCropGPU(64)((x,y), split_idx=0), contains='leave size out')
a.shape


# %% [markdown]
# ## Light
#
# fastai's `Brightness` and `Contrast` expect values from 0 to 1. Here each item is brought there by its own least and largest value, over all of its channels, changed as fastai does it, and brought back. `Hue` and
# `Saturation` are about colours, which there are none of: they are refused. `RandomErasing` writes noise into a box: of the mean and standard deviation of the item, whatever its normalisation.

# %%
#| exporti
@_teaches(LightingTfm)
def _light(self, x:TensorSlice):
    _check_batch(self, x)
    if any(isinstance(f, type(Saturation().fs[0])) for f in self.fs):
        raise ArgumentError("Saturation acts on colours; slices and radiographs are grey. Leave it out")
    t = x.as_subclass(Tensor)
    lo,hi = t.amin((1,2,3), keepdim=True),t.amax((1,2,3), keepdim=True)
    span = (hi-lo).clamp(min=1e-8)
    return _put_back(self.space_fn(((t-lo)/span).as_subclass(TensorImage),
                                   partial(compose_tfms, tfms=self.fs)).as_subclass(Tensor)*span+lo, x, x)

@_teaches(RandomErasing)
def _erase(self, x:TensorSlice):
    t = x.as_subclass(Tensor)
    sd,mean = torch.std_mean(t, (-3,-2,-1), correction=0, keepdim=True)
    sd = sd.clamp(min=1e-8)
    return _put_back(self.encodes(((t-mean)/sd).as_subclass(TensorImage)).as_subclass(Tensor)*sd+mean, x, x)


# %%
set_seed(0)
z = TensorSlice(torch.randn(3,2,8,8)*torch.tensor([1.,50.,4.]).view(3,1,1,1)-5)
for t in (Brightness(.4, p=1.), Contrast(.4, p=1.)):
    l = t(z, split_idx=0)
    assert not torch.allclose(l, z) and torch.equal(t(z, split_idx=1), z)
    test_close(l.amax((1,2,3)), z.amax((1,2,3)), 1e-1)                            # the range of each item stays
    for i in range(3): test_eq(l[i].flatten().argsort(), z[i].flatten().argsort())   # darker stays darker
e = RandomErasing(p=1., sl=.2, sh=.3)(z, split_idx=0)
test_eq((e!=z).any(1).flatten(1).float().mean(1)>.05, tensor([True]*3))
assert 20<float(e[1][e[1]!=z[1]].std())<100                                       # as wild as the item itself
test_fail(lambda: Saturation()(z, split_idx=0), contains='colours')
l.shape

# %% [markdown]
# ## What acts on nothing is refused
#
# The DataLoaders of slices, volumes and radiographs run their transforms by this pipeline. Before the first batch it asks of each transform whether it has an `encodes` for anything in the item, and refuses it by name where it
# has not. A function of your own, or a transform with an `encodes` for `TensorSlice`, `TensorVolume` or a label, works as ever.

# %%
#| exporti
_resizing = ('Resize','RandomResizedCrop','RandomCrop','OldRandomCrop','CropPad','RatioResize')

def _leaves(x): return [o for i in x for o in _leaves(i)] if isinstance(x, tuple) and not hasattr(x, '_fields') else [x]

def acts(
    t, # transform
    x  # item or batch
)->bool: # False where `t` has an `encodes`, and none for anything in `x`
    "Whether a transform does something with an item"
    calls = [c.__dict__['__call__'] for c in type(t).__mro__ if '__call__' in c.__dict__]
    if not isinstance(t, Transform) or not hasattr(t, 'encodes') or calls[0] not in [c.__dict__['__call__']
            for c in (Transform, RandTransform, ItemTransform)]:
        return True
    method = isinstance(t.encodes, MethodType)              # else made of a function, which has no self
    f,first = (t.encodes._f,(t,)) if method else (t.encodes,())
    def takes(o):
        try: f._resolve_method_with_cache((*first, o))
        except NotFoundLookupError: return False
        return True
    return any(takes(o) for o in ([list(x)] if isinstance(t, ItemTransform) and isinstance(x, tuple) else _leaves(x)))

def _transform_advice(t, x):
    name,first = type(t).__name__,_leaves(x)[0]
    if name=='Normalize':
        return "Every case is normalised already when it is read: say normalize= where the DataLoaders are made"
    if name in _resizing:
        return ("The size of an item is that of patch= (slices, volumes) or size= (radiographs), where the DataLoaders "
                "are made: a scan is predicted at it too")
    if name=='Hue': return "Slices and radiographs are grey: leave it out"
    if isinstance(first, TensorVolume):
        return ("fastai's transforms know pictures of two dimensions. For volumes there are volume_tfms() for "
                "batch_tfms and TorchIOTransform for item_tfms")
    return ("Of fastai's, Rotate, Zoom, Warp, Flip, Dihedral, RandomResizedCropGPU, Brightness, Contrast and "
            "RandomErasing work, in batch_tfms; "
            "of ours volume_tfms() or radiograph_tfms() there, and TorchIOTransform in item_tfms")

class MaskIds(Transform):
    "Class ids of a batch as int64: the losses of torch and fastai take nothing shorter"
    order = 99                                              # after what turns and warps, which is quicker on bytes
    def encodes(self, x:TensorVolumeMask|TensorSliceMask): return x.long()

class ActingPipeline(Pipeline):
    "A pipeline that refuses a transform that can act on nothing of what comes. Raises `ArgumentError`, which names it"
    def __init__(self,
        funcs=None,    # transforms, or a pipeline of them
        split_idx=None # 0: training, 1: validation
    ):
        super().__init__(funcs, split_idx)
        self.known = []                                     # transforms that were seen to act
    def __call__(self, o):
        for t in self.fs:
            if not any(t is k for k in self.known): self.check(t, o)
            o = t(o, split_idx=self.split_idx)
        return o
    def check(self,
        t, # transform
        o  # item or batch that it is about to get
    ):
        "Refuse `t` where it acts on nothing. What stands in a DataBlock without being asked for may: fastai's `ToTensor` and `IntToFloatTensor`, and `MaskIds` where scans are predicted"
        ours = any(isinstance(x, TensorMed) for x in _leaves(o))
        if ours and not isinstance(t, (ToTensor,IntToFloatTensor,MaskIds)) and not acts(t, o):
            found = ', '.join(type(x).__name__ for x in _leaves(o))
            raise ArgumentError(f"{type(t).__name__ if t.name.startswith(type(t).__name__) else t.name} would change "
                                f"nothing: it knows none of {found}. {_transform_advice(t, o)}")
        self.known.append(t)


# %%
v,vm = TensorVolume(torch.randn(1,4,4,4)),TensorVolumeMask(torch.zeros(4,4,4).long())
class Darker(Transform):
    def encodes(self, x:TensorSlice): return x-1
def inverted(x:TensorVolume): return -x
test_fail(lambda: ActingPipeline([Resize(64)])((x,y)),
          contains='Resize would change nothing: it knows none of TensorSlice, TensorSliceMask. The size')
test_fail(lambda: ActingPipeline([Rotate()])((v,vm)), contains='For volumes')
test_fail(lambda: ActingPipeline(aug_transforms())((v[None],vm[None])), contains='Flip would')
test_fail(lambda: ActingPipeline([Normalize.from_stats(*imagenet_stats)])((x,y)), contains='normalize=')
test_fail(lambda: ActingPipeline([FlipItem(1.)])((x,y)), contains='FlipItem would')
test_fail(lambda: ActingPipeline([Hue()])((x,y)), contains='grey')
test_fail(lambda: ActingPipeline([inverted])((x,y)), contains='inverted would')
test_eq(ActingPipeline([Darker, ToTensor])((x,y))[0], x-1)
test_eq(ActingPipeline([inverted, lambda o: o])((v,vm))[0], -v)
set_seed(0)
a,b = ActingPipeline(aug_transforms(), split_idx=0)((x,y))
assert not torch.equal(a, x) and not torch.equal(b, y)
[type(t).__name__ for t in aug_transforms()]
