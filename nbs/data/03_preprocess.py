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
# # preprocess
#
# > From the scan's own space to the network's, and back: one object describes both ways.

# %%
#| default_exp data.preprocess

# %% [markdown]
# A network wants scans that look alike: axes in one order, voxels of one size, intensities on one scale. The person wants the mask where the scan was.
# Both are the same knowledge, so it lives in one object. `Preprocess` is fitted on training cases alone, belongs to one pipeline, travels inside the
# DataLoaders and the exported Learner, prints itself and round-trips through JSON. It keeps nothing about a single case: the way back is computed from
# the case's own shape and affine.

# %%
#| export
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from fastcore.all import is_listy, L, store_attr
from fastmed.core import (
    ColumnError, FastmedError, InputError, orientation_of, spacing_of, TensorVolume, TensorVolumeMask
)
from fastmed.data.cases import check_codes
from fastmed.io.volumes import load_mask, load_volume, read_header, resample_to, resampled_grid, to_orientation
from torch import Tensor

# %%
#| hide
from fastcore.test import *
import os

# %% [markdown]
# ## Normalisation
#
# | name | what it does to each channel |
# |---|---|
# | `'zscore'` | subtract the mean, divide by the standard deviation, of all voxels |
# | `'nonzero'` | the same with the statistics of the non-zero voxels; zeros stay zero (as for BraTS) |
# | `'mean'` | the same statistics of the non-zero voxels, applied to every voxel (MedicalZoo's `mean`) |
# | `'ct'` | clip to the 0.5 and 99.5 percentiles of the foreground of the training cases, then their mean and standard deviation (nnU-Net) |
# | `'percentile'` | the case's 1st to 99th percentile become 0 to 1, clipped |
# | `'minmax'` | the case's least to greatest become 0 to 1 |
# | `'max'` | divide by the greatest absolute value |
# | `'none'` | leave the values alone |
#
# A constant image has no contrast to normalise: it becomes zeros (under `'max'`, plus or minus one), never NaN.

# %%
#| export
NORMALIZATIONS = ('zscore','nonzero','mean','ct','percentile','minmax','max','none')

def normalize_channel(
    a:np.ndarray,    # (X,Y,Z) float32, one channel
    how:str,         # one of `NORMALIZATIONS`
    stats:dict=None  # for 'ct': lo, hi, mean, std of this channel, from the training cases
)->np.ndarray:       # (X,Y,Z) float32
    "Bring one channel to a common scale. Sources: nnU-Net (Isensee 2021), MedicalZoo (Nikolaos 2019)"
    def z(v, m, s): return ((v-float(m))/float(s) if s>1e-8*max(1,abs(m)) else v*0).astype(np.float32, copy=False)
    if how=='none': return a
    if how=='zscore': return z(a, a.mean(dtype=np.float64), a.std(dtype=np.float64))
    if how in ('nonzero','mean'):
        nz = a!=0
        v = a[nz]
        if not len(v): return a
        r = z(a, v.mean(dtype=np.float64), v.std(dtype=np.float64))
        return np.where(nz, r, 0) if how=='nonzero' else r
    if how=='ct': return z(np.clip(a, stats['lo'], stats['hi']), stats['mean'], stats['std'])
    if how=='max':
        m = np.abs(a).max()
        return a/m if m>0 else a
    lo,hi = (a.min(),a.max()) if how=='minmax' else np.percentile(a, (1,99))
    return ((np.clip(a,lo,hi)-lo)/(hi-lo)).astype(np.float32) if hi>lo else a*0


# %%
import matplotlib.pyplot as plt
rng = np.random.default_rng(0)
a = np.where(rng.random((24,24,24))<.4, 0, rng.gamma(9, 30, (24,24,24))).astype(np.float32)
st = dict(lo=80, hi=600, mean=270, std=90)
fig,axs = plt.subplots(2, 4, figsize=(9,3.2))
for how,ax in zip(NORMALIZATIONS, axs.flat):
    r = normalize_channel(a, how, st)
    assert r.dtype==np.float32 and np.isfinite(r).all()
    assert np.isfinite(normalize_channel(np.full((4,4,4), 7, np.float32), how, st)).all()
    ax.hist(r.ravel(), 50, color='grey')
    ax.set_title(how, fontsize=9)
    ax.set_yticks([])
fig.tight_layout()


# %% [markdown]
# ## Preprocess
#
# `codes` names the structures. A list says that the mask's values are 0, 1, 2 …; a dict says which value (or values) of the file is which structure:
# `{'background':0, 'lesion':255}`. A value that nobody declared is refused, because a mask of 0, 1 and 255 in which 255 means "ignore" trains without
# complaint and is wrong. A value under two names is refused too (see `data.cases`), and so is a background that is not first.

# %%
#| export
class Preparation:
    "What happens to a case before the network, held in plain values: `Preprocess` of scans, `RadiographPrep` of pictures"
    def to_dict(self): raise NotImplementedError
    def to_json(self): return json.dumps(self.to_dict(), sort_keys=False)
    def __eq__(self, o): return type(self)==type(o) and self.to_json()==o.to_json()
    def __repr__(self): return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k,v in self.to_dict().items())})"

    @classmethod
    def from_json(cls,
        s:str           # what `to_json` wrote
    )->'Preparation':   # equal to the one that wrote it
        "The one that `to_json` wrote. Raises `InputError` naming a field that is unknown"
        try:
            d = dict(json.loads(s))
            odd = set(d)-set(cls().to_dict())
            res = None if odd else cls(**d)
        except FastmedError: raise
        except (ValueError, TypeError, RecursionError, OverflowError) as e:
            raise InputError(f"{cls.__name__}.from_json: expected what to_json wrote; found {str(e)[:200]}. Write it "
                             f"again") from e
        if odd: raise InputError(f"{cls.__name__}.from_json: unknown fields {_short(sorted(odd))}")
        return res

class Preprocess(Preparation):
    "What happens to a scan before the network and is undone after it: orientation, spacing, intensity, class ids"
    def __init__(self,
        spacing=None,            # None: the case's own; (3,) or one number, mm; 'auto': fitted
        normalize='zscore',      # one of `NORMALIZATIONS`, a list of them (one a channel), or 'auto': fitted
        orientation='RAS',       # order of the axes inside the pipeline, or None: the file's own
        # structures: list of names (class ids 0,1,…), or dict name → value or values in the file
        codes=None,
        order='linear',          # images: 'linear' or 'cubic'
        mask_order='smooth',     # masks: 'smooth' (each label interpolated, the largest wins) or 'nearest'
        stats=None,              # intensity statistics of the training cases, one dict a channel; fitted
    ):
        for n in ([normalize] if isinstance(normalize, str) else normalize):
            if n not in NORMALIZATIONS+('auto',):
                raise InputError(
                        f"normalize: expected one of {', '.join(NORMALIZATIONS)} or 'auto'; found {str(n)[:80]!r}")
        if order not in ('linear','cubic'):
            raise InputError(f"order: expected 'linear' or 'cubic'; found {str(order)[:80]!r}")
        if mask_order not in ('smooth','nearest'):
            raise InputError(f"mask_order: expected 'smooth' or 'nearest'; found {str(mask_order)[:80]!r}")
        if isinstance(spacing, (int,float,np.number)): spacing = (spacing,)*3
        if spacing is not None and spacing!='auto':
            spacing = tuple(float(o) for o in spacing)
            if len(spacing)!=3 or min(spacing)<=0:
                raise InputError(f"spacing: expected three sizes above 0, in mm; found {str(spacing)[:80]}")
        codes = check_codes(codes)
        store_attr('spacing,normalize,orientation,codes,order,mask_order,stats')

    # --- the way in
    def __call__(self, t):
        "Bring a `TensorVolume` or `TensorVolumeMask` onto the pipeline's grid and scale"
        mask = isinstance(t, TensorVolumeMask)
        if mask: t = self.to_ids(t)
        elif n:=int((~torch.isfinite(t.as_subclass(Tensor))).sum()):
            raise InputError(
                    f"{_tensor_name(t)}: {n} voxels are NaN or infinite. Repair the scan, or leave the case out")
        if self.orientation: t = to_orientation(t, self.orientation)
        if self.spacing is not None:
            t = resample_to(t, *resampled_grid(t.shape[-3:], t.affine, self._mm()), self.mask_order if mask
                            else self.order)
        if mask: return t
        hows = [self.normalize]*t.shape[0] if isinstance(self.normalize, str) else self.normalize
        if len(hows)!=t.shape[0]:
            raise InputError(f"{_tensor_name(t)}: {len(hows)} normalisations for {t.shape[0]} channels. Give one, or "
                             f"one a channel")
        if 'auto' in hows or ('ct' in hows and self.stats is None):
            raise InputError("This Preprocess is not fitted: call `fit` on the training cases first")
        if self.stats is not None and len(self.stats)!=t.shape[0]:
            raise InputError(
                    f"{_tensor_name(t)}: expected {len(self.stats)} channels, as in training; found {t.shape[0]}")
        v,stats = t.as_subclass(Tensor).numpy(),self.stats or [None]*len(hows)
        try:
            with np.errstate(over='raise'): a = np.stack([normalize_channel(c, h, s) for c,h,s in zip(v, hows, stats)])
        except FloatingPointError as e:
            raise InputError(f"{_tensor_name(t)}: its values, from {v.min():.3g} to {v.max():.3g}, are beyond 32 bits "
                             f"(3.4e38) once they are normalised. Repair the scan, or leave the case out") from e
        return TensorVolume(torch.from_numpy(a), **{**{k:v for k,v in t.__dict__.items() if k!='_affine'},
                                                    'affine':t.affine})

    # --- the way back
    def inverse(self,
        mask:TensorVolumeMask, # (X,Y,Z) on the pipeline's grid
        shape,                 # (3,) voxels of the scan
        affine                 # (4,4) voxel index → mm of the scan
    )->TensorVolumeMask:       # (X,Y,Z) on the scan's own grid
        "Bring a mask of class ids from the pipeline's grid back to the scan's own"
        s,a = self.oriented(shape, affine)
        m = resample_to(mask, s, a, self.mask_order)
        if self.orientation: m = to_orientation(m, orientation_of(affine))
        assert tuple(m.shape)==tuple(shape), f"inverse: expected {tuple(shape)}, found {tuple(m.shape)}"
        m.affine = affine
        return m

    def oriented(self,
        shape, # (3,) voxels of a scan
        affine # (4,4) voxel index → mm of it
    )->tuple:  # (shape, affine) with the pipeline's order of axes
        "A scan's grid after reorientation, before any change of spacing"
        if not self.orientation: return tuple(shape), np.asarray(affine)
        tr = nib.orientations.ornt_transform(nib.io_orientation(affine),
                                             nib.orientations.axcodes2ornt(self.orientation))
        return tuple(int(shape[i]) for i in np.argsort(tr[:,0])), affine@nib.orientations.inv_ornt_aff(tr, shape)

    def grid(self,
        shape, # (3,) voxels of a scan
        affine # (4,4) voxel index → mm of it
    )->tuple:  # (shape, affine) of its grid inside the pipeline
        "Where a scan's voxels will lie inside the pipeline"
        s,a = self.oriented(shape, affine)
        return (s,a) if self.spacing is None else resampled_grid(s, a, self._mm())

    def _mm(self):
        if self.spacing=='auto':
            raise InputError("This Preprocess is not fitted: call `fit` on the training cases first")
        return self.spacing

    # --- labels
    @property
    def vocab(self): return None if self.codes is None else list(self.codes)

    def to_ids(self,
        mask:TensorVolumeMask # values of the file
    )->TensorVolumeMask:      # class ids 0,1,…, uint8 (int16 above 255 structures)
        "Map the file's values to class ids. Raises `ValueError` naming the values that no code declares"
        a = mask.as_subclass(Tensor).numpy()
        found = np.unique(a)
        table = {v:i for i,vs in enumerate(self.codes.values()) for v in L(vs)} if isinstance(self.codes, dict) else \
                {i:i for i in range(len(self.codes) if self.codes is not None else 256)}
        odd = [int(v) for v in found if int(v) not in table]
        if odd or (self.codes is None and len(found) and not _consecutive(found)):
            want = _short(sorted(table)) if self.codes is not None else 'to be 0, 1, 2 … without a gap'
            raise InputError(
                    f"{_tensor_name(mask)}: expected the mask's values {want}; found {_short(odd or found.tolist())}. "
                             "Declare them: codes=['background', …] for 0,1,2…, or codes={'background':0, 'lesion':255}")
        dt = np.uint8 if len(set(table.values()))<=256 else np.int16
        if any(k!=v for k,v in table.items()):
            lut = np.zeros(int(found.max()-found.min())+1, dt)
            for v in found: lut[int(v-found.min())] = table[int(v)]
            a = lut[a-found.min()]
        kept = {k:v for k,v in mask.__dict__.items() if k!='_affine'}
        return TensorVolumeMask(torch.from_numpy(a.astype(dt)), **{**kept, 'affine':mask.affine, 'codes':self.vocab})

    # --- fitting
    def fit(self,
        images,     # list of image files (or lists of channel files) of the training cases
        masks=None, # list of their masks, for the foreground statistics of 'ct'
        n:int=50    # cases whose voxels are read; headers are read of all
    ):              # self
        "Fill in every 'auto' and the statistics from training cases alone"
        if not len(images): raise InputError("Preprocess.fit: no training cases")
        if self.spacing=='auto':
            self.spacing = auto_spacing([spacing_of(self.oriented(h['shape'], h['affine'])[1]) for h in map(read_header,
                    images)])
        hows = L(self.normalize)
        if not ('auto' in hows or 'ct' in hows): return self
        pick = np.unique(np.linspace(0, len(images)-1, min(n, len(images))).round().astype(int))
        samples = [self._sample(images[i], masks[i] if masks is not None else None) for i in pick]
        if 'auto' in hows:
            auto = [_auto_normalize(*zip(*[(o['zero'][c], o['all'][c]) for o in samples]))
                    for c in range(len(samples[0]['all']))]
            self.normalize = [a if h=='auto' else h for a,h in zip(auto, hows*len(auto) if len(hows)==1 else hows)]
            if len(set(self.normalize))==1: self.normalize = self.normalize[0]
        if 'ct' in L(self.normalize):
            self.stats = []
            for c in range(len(samples[0]['all'])):
                v = np.concatenate([o['fg'][c] for o in samples])
                if not len(v): v = np.concatenate([o['all'][c] for o in samples])
                lo,hi = np.percentile(v, (.5,99.5))
                self.stats.append(dict(lo=float(lo), hi=float(hi), mean=float(v.mean(dtype=np.float64)),
                                       std=float(v.std(dtype=np.float64))))
        return self

    def _sample(self, image, mask, k=20_000):
        x = load_volume(image, reorient=True).as_subclass(Tensor).numpy()
        x = x.reshape(len(x), -1)
        rng = np.random.default_rng(0)
        i = rng.integers(x.shape[1], size=k)
        fg = x[:,:0]
        if mask is not None:
            j = np.flatnonzero(self.to_ids(load_mask(mask, reorient=True)).as_subclass(Tensor).numpy())
            if len(j) and j.max()<x.shape[1]: fg = x[:, j[rng.integers(len(j), size=min(k,len(j)))]]
        return dict(zero=(x==0).mean(1), all=x[:,i], fg=fg)

    # --- printing and keeping
    def to_dict(self):
        return {k:getattr(self,k) for k in ('spacing','normalize','orientation','codes','order','mask_order','stats')}
    def __repr__(self):
        d = {k:v for k,v in self.to_dict().items() if v is not None}
        if 'stats' in d: d['stats'] = [{k:round(v,2) for k,v in o.items()} for o in d['stats']]
        return 'Preprocess(' + ', '.join(f'{k}={v!r}' for k,v in d.items()) + ')'

def _tensor_name(t): return (getattr(t, 'meta', None) or {}).get('fn', 'the tensor')
def _short(o, n=12):
    s = str(list(o)[:n])
    return f"{s[:300]}{' …' if len(o)>n or len(s)>300 else ''}"
def _consecutive(found): return int(found.min())==0 and len(found)==int(found.max())+1

def auto_spacing(
    spacings # list of (3,) mm, of the training cases in pipeline orientation
)->tuple:    # (3,) mm
    "The median spacing; an axis over three times coarser than the others takes its 10th percentile: fine cases keep their detail. Source: Isensee 2021"
    s = np.array(spacings)
    med = np.median(s, 0)
    k = int(med.argmax())
    if med[k]>3*np.delete(med, k).max(): med[k] = max(np.percentile(s[:,k], 10), np.delete(med, k).max())
    return tuple(float(np.round(o, 4)) for o in med)

def _auto_normalize(zeros, values):
    "CT where Hounsfield units show; the non-zero statistics where most of the scan is exactly zero; else the z-score"
    v = np.concatenate(values)
    if np.percentile(v, 1)<-500 and v.min()>=-4096 and np.allclose(v, np.round(v)): return 'ct'
    return 'nonzero' if np.median(zeros)>.3 else 'zscore'


# %% [markdown]
# There and back, for a mask on an oblique, anisotropic scan in an unusual orientation. The spacing changes, so the borders can move by part of a voxel;
# shape and affine may not.

# %%
c,s = np.cos(.3), np.sin(.3)
aff = np.array([[0,-.9*s,2.2*c,40],[.8,0,0,-30],[0,.9*c,2.2*s,12],[0,0,0,1.]])
g = np.stack(np.meshgrid(*[np.arange(n) for n in (40,44,20)], indexing='ij'))
ball = (((g-np.array([20,22,10])[:,None,None,None])*np.array([.8,.9,2.2])[:,None,None,None])**2).sum(0)<12**2
m = TensorVolumeMask(torch.from_numpy(ball.astype(np.int32)), affine=aff)
pre = Preprocess(spacing=1.3, codes=['background','ball'])
there = pre(m)
back = pre.inverse(there, m.shape, m.affine)
test_eq(back.shape, m.shape)
test_eq(back.affine, aff)
dice = 2*((back>0)&(m>0)).sum()/((back>0).sum()+(m>0).sum())
assert dice>.95
m.orientation, there.orientation, tuple(there.shape), round(dice.item(), 3)

# %% [markdown]
# Without a change of spacing, the way back is exact:

# %%
pre = Preprocess(codes=['background','ball'])
test_eq(pre.inverse(pre(m), m.shape, m.affine).numpy(), m.numpy())
test_eq(Preprocess.from_json(pre.to_json()), pre)
pre

# %% [markdown]
# Values that nobody declared are refused:

# %%
odd = TensorVolumeMask(torch.tensor([0,1,255]).view(3,1,1), affine=np.eye(4))
test_fail(lambda: Preprocess()(odd), contains='255')
test_fail(lambda: Preprocess(codes=['background','a'])(odd), contains='[255]')
test_eq(Preprocess(codes={'background':0,'a':1,'b':255})(odd).flatten().tolist(), [0,1,2])
test_eq(Preprocess(codes={'background':0,'any':[1,255]})(odd).flatten().tolist(), [0,1,1])
test_fail(lambda: Preprocess(codes={'background':0,'whole':[1,255],'core':255}), contains="'whole' and under 'core'")

# %%
#| hide
nan = TensorVolume(torch.tensor([0,1,float('nan')]).view(1,3,1,1), affine=np.eye(4), meta={'fn':'scan7.nii'})
test_fail(lambda: Preprocess()(nan), contains='scan7.nii')
test_fail(lambda: Preprocess(normalize='z'), contains='zscore')
test_fail(lambda: Preprocess(spacing=(1,2)), contains='three')
test_fail(lambda: Preprocess(normalize='ct')(TensorVolume(torch.zeros(1,3,3,3), affine=np.eye(4))),
          contains='not fitted')
test_eq(auto_spacing([(.5,.5,7.5),(.6,.6,3.3),(.5,.5,7.5)])[2]<7.5, True)
test_eq(auto_spacing([(1,1,1.2)]*3), (1,1,1.2))
const = TensorVolume(torch.full((1,6,7,5), 42.), affine=np.diag([1,1,3,1.]))
for o in ('linear','cubic'):
    test_close(Preprocess(spacing=(1.5,.7,1), normalize='none', order=o)(const).numpy(), 42, 1e-4)


# %% [markdown]
# ## What a plan is
#
# Which patches are cut, how many in a batch, how wide the network: `suggest_plan` of `plan` finds it. A `Plan` holds the values and why each is so. It lives here because exported Learners of every version look for it here.

# %%
#| export
class Plan(dict):
    "What `suggest_plan` found: values by name, and `.reasons` for each"
    def __init__(self,
        *args,        # as for a dict
        reasons=None, # dict name → why this value
        **kwargs      # values by name
    ):
        super().__init__(*args, **kwargs)
        self.reasons = reasons or {}
    def __getattr__(self, k):
        if k in self: return self[k]
        raise AttributeError(k)
    def __reduce__(self): return (_unpickled_plan, (dict(self), self.reasons))
    def to_json(self): return json.dumps(dict(values=self, reasons=self.reasons))
    @classmethod
    def from_json(cls,
        s:str  # what `to_json` wrote
    )->'Plan': # equal to the one that wrote it, with its reasons
        "The Plan that `to_json` wrote. Raises `InputError` on anything else"
        try:
            d = json.loads(s)
            values,reasons = dict(d['values']),dict(d['reasons'])
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise InputError(
                    f"Plan.from_json: expected what to_json wrote; found {str(s)[:80]!r}. Write it again") from e
        for k in ('spacing','patch'):
            if isinstance(values.get(k), list): values[k] = tuple(values[k])
        if 'strides' in values: values['strides'] = [tuple(o) for o in values['strides']]
        return cls(values, reasons=reasons)
    def __repr__(self):
        return '\n'.join(f"{k:<17}{str(v):<34}  {self.reasons.get(k,'')}".rstrip() for k,v in self.items())
    def _repr_html_(self):
        return pd.DataFrame([dict(value=str(v), reason=self.reasons.get(k,'')) for k,v in self.items()],
                index=list(self)).to_html()

def _unpickled_plan(d, reasons): return Plan(d, reasons=reasons)

def case_files(
    row,       # a case: a row of the DataFrame, or a dict
    cols,      # column name, or several: channels
    path='.'   # stands before relative names
):             # one path, or a list of paths: channels
    "The files of one case. Raises `KeyError` for a column and `ValueError` for a file that is missing, naming the case"
    fs = []
    for c in L(cols):
        if c not in row: raise ColumnError(f"column {c!r}: not in the DataFrame, which has {list(row.keys())}")
        for f in (row[c] if is_listy(row[c]) else [row[c]]):
            if f is None or f=='' or (isinstance(f, float) and math.isnan(f)):
                raise InputError(f"case {row.get('case', getattr(row, 'name', '?'))!r}: no file in column {c!r}. Drop "
                                 f"the row, or add the file")
            fs.append(str(Path(path)/f))
    return fs[0] if len(fs)==1 else fs

def all_files(
    df,       # one row a case
    cols,     # column name, or several: channels
    path='.'  # stands before relative names
)->list:      # what `case_files` gives, for each row
    "`case_files` of every row. Raises what it raises"
    return [case_files(r, cols, path) for _,r in df.iterrows()]


# %%
p = Plan(ndim=3, patch=(32,32,16), strides=[(2,2,1),(2,2,2)], bs=2, reasons=dict(patch='given', bs='as many as fit'))
q = Plan.from_json(p.to_json())
test_eq(dict(q), dict(p))
test_eq(q.reasons, p.reasons)
test_fail(lambda: Plan.from_json('[1]'), contains='Write it again')
p
