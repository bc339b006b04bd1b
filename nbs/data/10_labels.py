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
# # labels
#
# > What a case is, as one answer: classes, several yes-or-no findings, or numbers; the split that balances them; and a whole scan as one item.

# %%
#| default_exp data.labels

# %% [markdown]
# A mask says what each voxel is; a label says what the case is. fastai has the blocks for it, `CategoryBlock`, `MultiCategoryBlock` and `RegressionBlock`; this
# room chooses among them from the column, refuses a label that is missing before a minute of training is spent on it, splits so that each class stands on
# both sides while no subject does, and makes the whole scan one item: the label belongs to all of it, so nothing may be cropped away.

# %%
#| export
import math

import numpy as np
import pandas as pd
import torch.nn.functional as F
from fastai.data.all import (
    Categorize, CategoryBlock, DisplayedTransform, EncodedMultiCategorize, MultiCategorize, MultiCategoryBlock,
    RegressionBlock, RegressionSetup, show_title, tensor, TensorBase, TransformBlock, warn
)
from fastcore.all import first, ifnone, is_listy, L, store_attr
from fastmed.core import ArgumentError, ColumnError, InputError, TensorVolume, TensorVolumeMask
from fastmed.data.blocks import PatchTransform
from fastmed.data.cases import case_at, case_splitter, group_values
from fastmed.data.plan import BYTES, patch_plan, suggest_plan
from fastmed.data.preprocess import all_files, Plan, Preprocess
from fastmed.data.recipe import labels_of, plain_scalar
from fastmed.io.volumes import check_same_grid, read_header
from torch import Tensor

# %%
from fastmed.io.volumes import *
from fastai.data.all import *

# %%
#| hide
from fastcore.test import *
import os, tempfile
tmp = Path(tempfile.mkdtemp())


# %% [markdown]
# ## Which kind of label
#
# Text, bools and whole numbers with few different values are classes. A list in each row, text with a `label_delim`, or several columns of noughts and ones
# are findings of which a case may have any. Other numbers are regressed, several columns of them together. `y_block` says otherwise.

# %%
#| exporti
def is_blank(
    v  # a value of a table
):     # whether it says nothing
    "Whether a cell is empty: None, NA, NaT, nan, or text of blanks"
    return v is None or v is pd.NA or v is pd.NaT or (isinstance(v, str) and not v.strip()) or (isinstance(v,
            (float,np.floating)) and math.isnan(v))


# %%
#| export
def _many(v): return isinstance(v, (list,tuple,set,frozenset,np.ndarray,L))

def _y_kind(y_block):
    "'category', 'multi' or 'regression' of what a person gave as `y_block`, and the block itself where it is one"
    names = dict(category=CategoryBlock, multi=MultiCategoryBlock, regression=RegressionBlock)
    if isinstance(y_block, str):
        if y_block not in names:
            raise InputError(
                    f"y_block: expected 'category', 'multi', 'regression' or a TransformBlock; found {y_block!r}")
        return y_block,None
    if callable(y_block) and not isinstance(y_block, TransformBlock):
        k = first(k for k,v in names.items() if v is y_block)
        if k: return k,None
        y_block = y_block()
    if not isinstance(y_block, TransformBlock):
        raise ArgumentError(
                f"y_block: expected 'category', 'multi', 'regression' or a TransformBlock; found {y_block!r}")
    tfms = [t if not isinstance(t, type) else t.__new__(t) for t in L(y_block.type_tfms)]
    for k,c in (('multi',(MultiCategorize,EncodedMultiCategorize)), ('category',Categorize),
            ('regression',RegressionSetup)):
        if any(isinstance(t, c) for t in tfms): return k,y_block
    raise InputError("y_block: expected a block of fastai's, CategoryBlock, MultiCategoryBlock or RegressionBlock; "
                     "found a TransformBlock without their transforms")

def label_kind(
    df,               # one row a case
    label_col,        # column, or several
    label_delim=None  # stands between the findings of a text
)->str:               # 'category', 'multi' or 'regression'
    "What the labels are, from their values. Raises `InputError` on a label that is missing, naming the case, and on several columns of text"
    cols,few = L(label_col),10
    for c in cols:
        if c not in df: raise ColumnError(f"label_col {c!r}: not in the DataFrame, which has {list(df)}")
        no = [i for i,v in enumerate(df[c]) if not _many(v) and is_blank(v)
              and not (label_delim and isinstance(v, str))]
        if no:
            raise InputError(f"case {case_at(df, no[0])!r} has no "
                             f"{c}{f' ({len(no)} cases have none)' if len(no)>1 else ''}. Fill it in, or leave the "
                             f"case out: "
                             f"df.dropna(subset=[{c!r}])")
    if len(cols)==1:
        v = df[cols[0]]
        if label_delim or any(_many(o) for o in v): return 'multi'
        if pd.api.types.is_bool_dtype(v) or not pd.api.types.is_numeric_dtype(v):
            if all(isinstance(o, (float,np.floating)) for o in v): return 'regression'
            return 'category'
        return 'category' if pd.api.types.is_integer_dtype(v) and v.nunique()<=few else 'regression'
    if text:=[c for c in cols if not (pd.api.types.is_numeric_dtype(df[c]) or pd.api.types.is_bool_dtype(df[c]))]:
        raise InputError(f"label_col {list(cols)}: expected columns of 0 and 1, or of numbers; found text in {text}. "
                         f"Give one column, or turn it into 0 and 1: df[{text[0]!r}]==…")
    return 'multi' if all(df[c].isin([0,1]).all() for c in cols) else 'regression'


# %%
d = pd.DataFrame(dict(case=list('abcdef'), view=['AP','PA','AP','PA','AP','AP'], sick=[True,False]*3,
                                                 grade=[0,1,2,0,1,2], age=[61.,48.,57.,39.,70.,22.],
                                                 sex01=[0,1,1,0,1,0],
                      findings=['Edema|Mass','','Mass','Edema','Mass',''], which=[['a'],[],['a','b'],['b'],['a'],[]]))
{str(c):label_kind(d, c, '|' if c=='findings' else None) for c in ('view','sick','grade','age','findings','which',
        ['sick','sex01'],['age','sex01'])}

# %%
test_eq([label_kind(d, c) for c in ('view','sick','grade','age','which',['sick','sex01'],['age','sex01'])],
        ['category']*3+['regression','multi','multi','regression'])
test_fail(lambda: label_kind(d.assign(view=['AP',None]+['PA']*4), 'view'), contains="'b' has no view")
test_fail(lambda: label_kind(d, ['view','sex01']), contains='text')


# %% [markdown]
# ## From the column to the block
#
# `LabelOf` reads the label out of a row. The classes are those of the whole table, in alphabetical order or that of a pandas `Categorical`, so that the numbers of the classes do not hang on the split; a class
# that training never sees is refused. Targets of a regression stay in their own unit: it is the network that scales (`learn.classify`), so predictions, targets and metrics are
# years where the column holds years.

# %%
#| export
class TensorRegression(TensorBase):
    "The numbers (n,) that belong to a case, each in its own unit"
    def show(self, ctx=None, **kwargs):
        return show_title(', '.join(f'{float(o):.4g}' for o in self.flatten()), ctx=ctx, **kwargs)

class LabelOf(DisplayedTransform):
    "The label of a row: its class, the list of its findings, or its numbers"
    input_types = (pd.Series, dict)
    def __init__(self,
        cols,             # column, or a list of them
        kind='category',  # 'category', 'multi' or 'regression'
        label_delim=None, # stands between the findings of a text
        group=None        # column of the subject
    ): store_attr()
    def encodes(self, o):
        if not isinstance(o, (pd.Series, dict)): return o
        vs = [plain_scalar(o[c]) for c in L(self.cols)]
        if self.kind=='regression': return [float(v) for v in vs]
        if self.kind=='category': return vs[0]
        if len(vs)>1: return [float(v) for v in vs]
        v = vs[0]
        if isinstance(v, str): v = [s for s in (s.strip() for s in v.split(self.label_delim)) if s]
        elif not _many(v): v = [] if is_blank(v) else [v]
        return sorted({plain_scalar(i) for i in v}, key=str)
    def in_recipe(self): return dict(label=self.cols, group=self.group, label_delim=self.label_delim)

class TargetNumbers(RegressionSetup):
    "Numbers as a `TensorRegression` with their names"
    def __init__(self,
        vocab # names of the targets
    ): self.vocab,self.c = list(vocab),len(vocab)
    def encodes(self, o): return TensorRegression(tensor(o).float().reshape(-1))
    def decodes(self, o:TensorRegression): return o
    def setups(self, dsets): pass

def label_block(
    df,              # one row a case: all of them
    label_col,       # column, or several
    y_block=None,    # None: from the values; 'category', 'multi', 'regression', or a block of fastai's
    label_delim=None,# stands between the findings of a text
    train=None,      # numbers of the training rows, to refuse a class that none of them has
    group_col=None   # column of the subject, remembered for intervals over subjects; default 'subject' where it exists
)->tuple:            # (`TransformBlock`, getter of the label, kind)
    "The block for these labels and what reads them. Raises `InputError` on a missing label, on one class alone, on a class that training lacks"
    found = label_kind(df, label_col, label_delim)
    kind,block = (found,None) if y_block is None else _y_kind(y_block)
    cols = label_col if isinstance(label_col, str) or not is_listy(label_col) else (list(label_col) if len(label_col)>1
            else list(label_col)[0])
    if kind=='category' and is_listy(cols): raise InputError(f"y_block='category': expected one column; found {cols}")
    get = LabelOf(cols, kind, label_delim, ifnone(group_col, 'subject' if 'subject' in df else None))
    rows = [get(r) for _,r in df.iterrows()] if kind!='regression' else []
    if kind=='regression':
        num = df[L(cols)].apply(pd.to_numeric, errors='coerce')
        if (bad:=~np.isfinite(num.astype(float))).any(axis=None):
            i,c = np.argwhere(bad.values)[0]
            raise InputError(f"case {case_at(df, i)!r}: {num.columns[c]} is {df[num.columns[c]].iloc[i]!r}; expected a "
                             f"number, to be regressed")
        if train is not None:
            for c in num:
                if num[c].iloc[list(train)].nunique()<2:
                    raise InputError(f"label_col {c!r}: all training cases have the same value, {num[c].iloc[0]:g}: "
                                     f"there is nothing to learn")
        if found=='regression' and y_block is None and all(num[c].isin([0,1]).all() for c in num):
            warn(f"label_col {cols!r} holds 0 and 1 as fractions and is regressed; say y_block='category' where they "
                 f"are classes")
        return (TransformBlock(type_tfms=[TargetNumbers([str(c) for c in L(cols)])]) if block is None
                else block), get, kind
    if kind=='multi' and is_listy(cols):
        if (odd:=[c for c in cols if not df[c].isin([0,1]).all()]):
            raise InputError(f"label_col {odd}: expected 0 and 1 alone, one column a finding")
        return (MultiCategoryBlock(encoded=True, vocab=[str(c) for c in cols]) if block is None else block), get, kind
    each = rows if kind=='multi' else [[o] for o in rows]
    vocab = sorted({v for r in each for v in r}, key=lambda v: (isinstance(v, str), v))
    # in the order that was said
    if kind=='category' and isinstance(df[cols].dtype, pd.CategoricalDtype):
        vocab = [v for v in map(plain_scalar, df[cols].cat.categories) if v in vocab]
    if len(vocab)<(2 if kind=='category' else 1):
        raise InputError(f"label_col {label_col!r}: expected "
                         f"{'two classes or more' if kind=='category' else 'at least one finding'}; found {vocab} in "
                         f"{len(df)} cases")
    if kind=='category' and len(vocab)>max(4, len(df)//2):
        raise InputError(f"label_col {label_col!r}: {len(vocab)} classes in {len(df)} cases. Is it a name? Numbers are "
                         f"regressed with y_block='regression'")
    if train is not None:
        seen = {v for i in train for v in each[int(i)]}
        if lost:=[v for v in vocab if v not in seen]:
            i = next(i for i,r in enumerate(each) if lost[0] in r)
            raise InputError(f"label_col {label_col!r}: no training case is {lost[0]!r}, which case {case_at(df, i)!r} "
                             f"of validation is. Split otherwise (seed, valid_col), merge classes, or leave it out")
    if block is None:
        block = CategoryBlock(vocab=vocab, sort=False) if kind=='category' else MultiCategoryBlock(vocab=vocab)
    return block,get,kind


# %%
block,get,kind = label_block(d, 'view')
kind, get(d.iloc[1]), LabelOf('findings', 'multi', '|')(d.iloc[0]), LabelOf(['age','sex01'], 'regression')(d.iloc[0])

# %%
#| hide
test_eq(get(d.iloc[1]), 'PA')
test_eq(list(label_block(d.assign(view=pd.Categorical(d['view'], ['PA','AP'])), 'view')[0].type_tfms[0].vocab),
        ['PA','AP'])
test_fail(lambda: label_block(d.assign(view='AP'), 'view'), contains='two classes')
test_fail(lambda: label_block(d, 'view', train=[0,2,4]), contains="no training case is 'PA'")
test_fail(lambda: label_block(d, 'view', y_block='regression'), contains='expected a number')
test_eq(label_block(d, 'age', y_block=RegressionBlock)[2], 'regression')
test_eq(label_block(d, 'grade', y_block=RegressionBlock())[2], 'regression')
test_eq(label_block(d, 'grade', y_block=CategoryBlock())[2], 'category')


# %% [markdown]
# ## The split
#
# Groups are taken one by one in a random order, and one goes to validation where that brings validation nearer to its share of every class and of all cases.
# So a class is as frequent on both sides as whole subjects allow. Numbers are balanced by fifths.

# %%
#| export
def _indicators(df, cols, kind, label_delim=None):
    "(cases, k) of 0 and 1: what is to be balanced, one column for all cases among it"
    get = LabelOf(cols, kind, label_delim)
    if kind=='regression':
        v = df[L(cols)[0]].astype(float)
        b = pd.qcut(v.rank(method='first'), min(5, len(v)), labels=False)
        m = pd.get_dummies(b)
    elif kind=='multi' and is_listy(cols): m = df[list(cols)].astype(float)
    else:
        rows = [L(get(r)) for _,r in df.iterrows()]
        vocab = sorted({str(v) for r in rows for v in r})
        m = pd.DataFrame([[str(v) in {str(o) for o in r} for v in vocab] for r in rows])
    return np.c_[m.values.astype(float), np.ones(len(df))]

def StratifiedSplitter(
    groups,             # group of each item, such as the subject; its own number where each stands alone
    classes,            # (items, k) of 0 and 1: the classes to balance
    valid_pct:float=.2, # share of the items, reached as nearly as whole groups allow
    seed:int=42         # of the draw
):                      # function: items → (training indices, validation indices)
    "A splitter that never parts a group and gives both sides the same share of each class, as nearly as that allows. Raises `InputError` on fewer than two groups"
    g = pd.Series(list(groups)).astype(str)
    m = np.asarray(classes, dtype=float)
    names = np.unique(g)
    if len(names)<2:
        raise InputError(f"expected at least two groups to split; found {names.tolist()} in {len(g)} items. Give more "
                         f"subjects, or group_col with finer groups")
    if not 0<valid_pct<1: raise InputError(f"valid_pct: expected a share between 0 and 1; found {valid_pct}")
    k = np.searchsorted(names, g)
    sums = np.zeros((len(names), m.shape[1]))
    np.add.at(sums, k, m)
    want,have,valid = valid_pct*sums.sum(0),np.zeros(m.shape[1]),[]
    # a rare class weighs as much as a common one, the number of cases twice
    w = 1/np.maximum(want, 1e-9)
    w[-1] *= 2
    order = np.random.default_rng(seed).permutation(len(names))
    for i in order:
        if len(valid)<len(names)-1 and (np.abs(want-have-sums[i])*w).sum()<(np.abs(want-have)*w).sum()-1e-12:
            valid.append(i)
            have = have+sums[i]
    if not valid: valid = [min(order, key=lambda i: (np.abs(want-sums[i])*w).sum())]
    v = np.isin(k, valid)
    def _inner(o):
        assert len(o)==len(v), f"StratifiedSplitter was made for {len(v)} items and got {len(o)}"
        return L(np.flatnonzero(~v).tolist()), L(np.flatnonzero(v).tolist())
    return _inner

def label_splitter(
    df,               # one row a case
    label_col,        # column, or several
    kind,             # 'category', 'multi' or 'regression'
    label_delim=None, # stands between the findings of a text
    group_col=None,   # column whose groups are never parted; default 'subject' where it exists
    valid_col=None,   # bool column: validation cases
    valid_pct=.2,     # share of validation cases
    seed=42,          # of the draw
    stratify=True     # balance the classes
):                    # function: items → (training indices, validation indices)
    "The split of labelled cases: by `valid_col`, else balanced, subjects whole. Raises `InputError`, `ColumnError`"
    if not stratify or valid_col is not None: return case_splitter(df, group_col, valid_col, valid_pct, seed)
    cols = list(label_col) if is_listy(label_col) and len(label_col)>1 else L(label_col)[0]
    g = group_values(df, group_col) if group_col is not None or 'subject' in df else range(len(df))
    return StratifiedSplitter(g, _indicators(df, cols, kind, label_delim), valid_pct, seed)


# %%
rng = np.random.default_rng(0)
big = pd.DataFrame(dict(subject=rng.integers(60, size=200).astype(str)))
big['rare'] = rng.random(200)<.08
def shares(stratify):
    return [big.rare.iloc[label_splitter(big, 'rare', 'category', seed=s, stratify=stratify)(big)[1]].mean()
                                         for s in range(20)]
f'{big.rare.mean():.3f} in all; in validation {np.mean(shares(True)):.3f} ± {np.std(shares(True)):.3f} balanced, {np.mean(shares(False)):.3f} ± {np.std(shares(False)):.3f} not'

# %%
assert np.std(shares(True))<np.std(shares(False))/1.5
tr,va = label_splitter(big, 'rare', 'category')(big)
assert not set(big.subject[tr]) & set(big.subject[va]) and abs(len(va)/200-.2)<.03


# %% [markdown]
# ## The whole scan as one item
#
# All cases come onto one grid of `size` voxels at one spacing. What is smaller is set in the middle and its edge goes on; what is larger is made smaller, all three axes by the same factor, so that nothing
# of it is lost. Nothing is ever cropped. `whole_plan` chooses the spacing so that every training scan fits: with no size given, the cases' own spacing and the largest of them, coarsened
# until it fits the memory.

# %%
#| export
def whole_plan(
    df,                   # one row a case, with `image_col`; the training cases
    ndim:int=3,           # 3: volumes; 2: slices, whole in their plane
    image_col='image',    # column (or columns: channels) of the image files
    path='.',             # stands before relative file names
    size=None,            # voxels, one number or one an axis (of the slice, in 2D); None: from the data
    spacing='auto',       # None: each case's own; mm; or 'auto'
    orientation='RAS',    # order of the axes
    bs:int=None,          # batch size
    samples_per_case='auto', # slices of each case in an epoch
    axis='auto',          # slices: array axis that is cut across
    context:int=0,        # slices: neighbours on each side that become channels
    device=None,          # device that the memory is of
    memory:float=None,    # GiB for a training step; default: `default_memory`
    heads=None            # what `read_header` says of each case, where it was read already
)->Plan:                  # as of `suggest_plan`, `patch` being the grid of the whole scan, and `whole` True
    "The grid that every training scan fits on, and its spacing, each with its reason. Raises `InputError` on a size that is none"
    if heads is None: heads = [read_header(o) for o in all_files(df, image_col, path)]
    base = suggest_plan(df, ndim, image_col, path, spacing=spacing, orientation=orientation, bs=bs, axis=axis,
                        context=context, device=device, memory=memory, heads=heads)
    ax = [a for a in range(3) if ndim==3 or a!=base.axis]
    pre = Preprocess(base.spacing, orientation=orientation)
    # scans of one grid count once
    heads = list({(tuple(h['shape']), np.asarray(h['affine']).tobytes()):h for h in heads}.values())
    def need(sp):
        p = Preprocess(sp, orientation=orientation)
        return np.max([p.grid(h['shape'], h['affine'])[0] for h in heads], 0)
    why,sp,n = dict(base.reasons),base.spacing,need(base.spacing)
    bs_ = ifnone(bs, 4 if ndim==3 else 32)
    room = int(base.memory*2**30/(BYTES*16*bs_))
    auto = isinstance(spacing, str)
    if size is None:
        f = 1.
        if auto:
            while (p:=math.prod(-(-int(n[a])//8)*8 for a in ax))>room and f<16:
                f *= 1.05
                n = need(tuple(s*(f if a in ax else 1) for a,s in enumerate(base.spacing)))
            sp = tuple(s*(f if a in ax else 1) for a,s in enumerate(base.spacing))
        full = [-(-int(n[a])//8)*8 if a in ax else 1 for a in range(3)]
        why['patch'] = 'voxels; holds the largest training scan, in multiples of 8'
        if f>1: why['spacing'] = f'mm; {f:.2f} times the median, so that the largest scan fits the memory'
    else:
        given = [size]*len(ax) if isinstance(size, (int,np.integer)) else list(size)
        if len(given)==3 and ndim==2: given = [given[a] for a in ax]
        if len(given)!=len(ax) or any(isinstance(o, bool) or not isinstance(o, (int,np.integer)) or o<4 for o in given):
            raise InputError(f"size: expected {len(ax)} whole numbers of 4 or more; found {size!r}")
        full = [1]*3
        for a,g in zip(ax, given): full[a] = int(g)
        why['patch'] = 'given'
        if auto:
            f = 1.
            for _ in range(200):
                over = max(need(tuple(s*(f if a in ax else 1) for a,s in enumerate(base.spacing)))[a]/full[a]
                           for a in ax)
                if over<=1: break
                f *= max(over, 1.001) if over>1.02 else 1.005
            sp = tuple(s*(f if a in ax else 1) for a,s in enumerate(base.spacing))
            if f>1: why['spacing'] = f'mm; {f:.2f} times the median, so that the largest training scan fits the size'
    if samples_per_case=='auto':
        samples_per_case = 1 if ndim==3 else max(1, min(16, math.ceil(64*bs_/max(1, len(df)))))
        why['samples_per_case'] = 'the whole scan once' if ndim==3 else 'slices of each case in an epoch'
    elif isinstance(samples_per_case, bool) or not isinstance(samples_per_case, (int,np.integer)) or samples_per_case<1:
        raise InputError(
                f"samples_per_case: expected 'auto' or a whole number of 1 or more; found {samples_per_case!r}")
    why['bs'] = 'given' if bs is not None else 'scans of a batch'
    kept = patch_plan(tuple(full), sp, context, base.nf)
    return Plan({**base, **kept, 'spacing':sp, 'bs':bs_, 'samples_per_case':samples_per_case, 'whole':True},
                 reasons=why)

class WholeTransform(PatchTransform):
    "The whole scan on the grid of a plan: set in its middle, its edge going on, or made smaller where it is larger; in 2D one slice of it, whole"
    def __init__(self,
        plan # `Plan` of `whole_plan`
    ): super().__init__(plan, 0.)

    def __call__(self, b, split_idx=None, **kwargs):
        xs = b if isinstance(b, (tuple,list)) else (b,)
        x,m = xs[0],first(o for o in xs if isinstance(o, TensorVolumeMask))
        if not isinstance(x, TensorVolume): return b
        if m is not None: check_same_grid(x, m)
        draw = getattr(x, 'draw', None)
        at = self.place(x, draw, split_idx)
        res = tuple(self.patch(fit_in(o, self.plan), at) if isinstance(o, (TensorVolume,TensorVolumeMask)) else o
                    for o in xs)
        return res if isinstance(b, (tuple,list)) else res[0]

    def place(self,
        x,             # `TensorVolume` of the scan
        draw=None,     # (epoch's seed, number of the item, number of its sample), from `PatchDL`
        split_idx=None # 0: training, where the slice is drawn
    )->tuple:          # (3,) corner of the scan's grid, negative where it hangs over the edge
        "The scan in the middle; in 2D a slice drawn anew in training, else spread evenly from the middle one outwards"
        n = fitted_shape(x.shape[-3:], self.plan)
        c = [-((p-s)//2) for s,p in zip(n, self.plan.patch)]
        if self.plan.ndim==2:
            a = self.plan.axis
            k = n[a]
            if split_idx==0 and draw is not None: c[a] = int(np.random.default_rng(draw).integers(k))
            else: c[a] = min(k-1, int(k*((.5+(draw[-1] if draw is not None else 0)*.6180339887)%1)))
        return tuple(c)

def fitted_shape(
    shape, # (3,) voxels of a preprocessed scan
    plan   # `Plan` of `whole_plan`
)->tuple:  # (3,) voxels, none above those of the plan
    "The shape of a scan where it had to be made smaller to fit, all axes by one factor; its own where it fits"
    ax = [a for a in range(3) if plan.ndim==3 or a!=plan.axis]
    f = max(1., *[shape[a]/plan.patch[a] for a in ax])
    return tuple(int(n) for n in shape) if f==1 else tuple(max(1, min(plan.patch[a], int(round(n/f)))) if a in ax
                                                           else int(n) for a,n in enumerate(shape))

def fit_in(
    t,   # `TensorVolume` or `TensorVolumeMask`, preprocessed
    plan # `Plan` of `whole_plan`
):       # the same, or a smaller one where it did not fit
    "A scan larger than the grid, made smaller: averaged where that is by two or more, else interpolated. Source of the edge rule: `F.interpolate`"
    to = fitted_shape(t.shape[-3:], plan)
    if to==tuple(t.shape[-3:]): return t
    mask = isinstance(t, TensorVolumeMask)
    x = t.as_subclass(Tensor)
    x = (x[None] if mask else x)[None].float()
    area = max(a/b for a,b in zip(t.shape[-3:], to))>=2
    x = F.interpolate(x, to, mode='nearest') if mask else F.interpolate(x, to,
            mode='area') if area else F.interpolate(x, to, mode='trilinear', align_corners=False)
    x = (x[0,0] if mask else x[0]).to(t.dtype)
    s = np.array(t.shape[-3:])/np.array(to)
    aff = t.affine@np.diag([*s, 1])
    aff[:3,3] = (t.affine@np.array([*((s-1)/2), 1]))[:3]
    return type(t)(x, **{**{k:v for k,v in t.__dict__.items() if k not in ('_affine','fg')}, 'affine':aff})


# %% [markdown]
# A phantom of 24×30×20 voxels on a grid of 32×24×24: made smaller by 30/24, then set in the middle.

# %%
from fastmed.data.datasets import phantom
im,_ = phantom((24,30,20))
im.to_filename(tmp/'p.nii.gz')
plan = Plan(ndim=3, patch=(32,24,24), spacing=(1.,1.,1.), whole=True)
x = load_volume(tmp/'p.nii.gz')
y = WholeTransform(plan)(x)
test_eq(tuple(y.shape), (1,32,24,24))
test_eq(fitted_shape(x.shape[1:], plan), (19,24,16))
y.show(axis=2, figsize=(3,3))

# %%
#| hide
c0,c1 = [(t.affine@np.array([*(np.argwhere(t[0].numpy()>t.max().item()*.5).mean(0)), 1]))[:3] for t in (x,y)]
assert np.abs(c0-c1).max()<1., (c0,c1)                               # the same place in millimetres
df = pd.DataFrame([dict(case='p', image=tmp/'p.nii.gz')])
test_eq(whole_plan(df, size=(24,24,24), device='cpu').patch, (24,24,24))
assert whole_plan(df, size=24, device='cpu').spacing[0]>1.2
test_eq(whole_plan(df, device='cpu').patch, (24,32,24))
test_eq(whole_plan(df, 2, axis=2, device='cpu').patch, (24,32,1))


# %% [markdown]
# ## What DataLoaders hold
#
# As with everything else, read off the transforms, which an exported Learner keeps.

# %%
#| export
def get_labels(
    dls # DataLoaders
):      # (kind, names) of their labels: classes, findings or targets; None where they hold none
    "'category', 'multi' or 'regression', and the names; None where nothing of the kind is there. In a recipe: `dls.recipe.labels`"
    return labels_of(dls)
