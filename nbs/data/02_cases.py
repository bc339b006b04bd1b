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
# # cases
#
# > One table of what is there: cases, images, masks, subjects; and the split that keeps a subject on one side.

# %%
#| default_exp data.cases

# %% [markdown]
# Everything in fastmed starts from a DataFrame with a row a case. This room makes it from a folder. It pairs images with masks by name, gathers the
# channels of a case, and adds the `subject` where a `cases.csv` tells it, because two scans of one person must never stand on both sides of a split. A
# case whose partner is missing stays in the table, with an empty cell that shows it.

# %%
#| export
import glob
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.data.all import warn
from fastcore.all import first, is_listy, L
from fastmed.core import ArgumentError, ColumnError, FileError, InputError, MissingFileError
from fastmed.io.guard import reading

# %%
from fastai.data.all import *

# %%
#| hide
from fastcore.test import *
import os, tempfile


# %%
#| export
def case_name(
    fn, # image or mask file
)->str: # its name without folder and suffixes
    "The name of a case: 'sub 01.v2.nii.gz' → 'sub 01.v2'; an ü of two signs, as macOS writes it, is one of one sign; bytes that are no letters are written as numbers, since no table holds them"
    n = unicodedata.normalize('NFC', os.fsencode(Path(fn).name).decode('utf-8', 'backslashreplace'))
    return re.sub(r'\.(nii\.gz|nii|nrrd|mha|mhd|nhdr|hdr|img|png|dcm)$', '', n, flags=re.I)

def _subjects(df, path):
    "Add `subject` (and whatever else it holds) from `cases.csv`"
    fn = path/'cases.csv'
    if not fn.exists(): return df
    with reading(fn, 'a table of cases, UTF-8 with a line of column names', 'Save it again as CSV'):
        extra = pd.read_csv(fn, dtype=str, skipinitialspace=True, nrows=0)
        extra = pd.read_csv(fn, dtype={c:str for c in extra if c.strip() in ('case','subject')},
                skipinitialspace=True).rename(columns=str.strip)
    if 'case' not in extra:
        raise InputError(f"{fn}: expected a table with a column 'case', its columns parted by commas; found "
                         f"{list(extra)[:8]}. Save it so, or give the file another name")
    extra['case'] = [unicodedata.normalize('NFC', o) if isinstance(o, str) else o for o in extra.case]
    cols = [c for c in extra if c=='case' or c not in df]
    if extra.case.duplicated().any():
        raise InputError(
                f"{fn}: expected one line a case; {extra.case[extra.case.duplicated()].tolist()[:5]} stand twice")
    return df.merge(extra[cols], on='case', how='left')

_few = 8   # channels of a case that need no declaration

def _matches(path, what, pattern):
    "(files, the folders of each that the pattern leaves open), hidden ones left out"
    if not isinstance(pattern, str) or not pattern.strip('. ') or Path(pattern).is_absolute() or len(pattern)>1000:
        raise InputError(
                f"{what}: expected a pattern below {path}, such as 'images/*.nii.gz'; found {str(pattern)[:80]!r}")
    parts = Path(pattern).parts[:-1]
    wild = [glob.has_magic(o) for o in parts]
    def folders(fn):
        own = fn.relative_to(path).parts[:-1]
        if '**' not in parts: return tuple(o for o,w in zip(own, wild) if w)
        # as many as `**` takes, without the named ones around them
        return own[wild.index(True):len(own)-wild[::-1].index(True)]
    files = sorted(o for o in path.glob(pattern) if not o.name.startswith('.'))
    there = set(files)
    # its voxels, of which the header is the name
    files = [o for o in files if o.suffix.lower()!='.img' or o.with_suffix('.hdr') not in there]
    return files,[folders(o) for o in files]

def _declared_channels(path):
    "How many channels the `dataset.json` of a folder names; 0 where there is none that does"
    try: info = json.loads((path/'dataset.json').read_text(encoding='utf-8-sig'))
    except (OSError, ValueError): return 0
    named = info.get('channel_names', info.get('modality')) if isinstance(info, dict) else None
    return len(named) if isinstance(named, (dict,list)) else 0

def _some_files(fs, n=3): return ', '.join(map(str, fs[:n]))+(f' … ({len(fs)})' if len(fs)>n else '')

def _image_groups(files, folders, masks, channels):
    "{(open folders, folder, name): files}: `case_0000`, `case_0001` … of one folder are one case, unless masks say that they are scans"
    there,scans,res = {(o.parent, case_name(o)) for o in files},{(t, n[:-5]) for t,
            n in masks if re.fullmatch(r'.+_\d{4}', n)},{}
    for o,t in zip(files, folders):
        n = case_name(o)
        m = re.fullmatch(r'(.+)_(\d{4})', n)
        if channels is not None: channel = m and channels>1
        elif not m or (t,n) in masks: channel = False
        elif (t,m[1]) in masks: channel = True
        else:
            # without a mask to tell, channels are numbered from 0000
            channel = (t,m[1]) not in scans and (o.parent, f'{m[1]}_0000') in there
        res.setdefault((t, o.parent, m[1] if channel else n), []).append(o)
    return res

def _check_groups(path, groups, channels):
    "Raise `InputError` where the files of a case are no channels, are not as many as was said, or are more than anybody said"
    most = _few if channels is None else channels
    if any(len(fs)>most for fs in groups.values()) and channels is None: most = max(most, _declared_channels(path))
    for (_,_,n),fs in groups.items():
        if len({case_name(o) for o in fs})<len(fs) or len(fs)>1 and n in map(case_name, fs):
            raise InputError(f"{path}: case {n!r} has several files, {_some_files(fs)}; expected one, or channels "
                             f"{n}_0000, {n}_0001 … Take one away, or give a pattern that matches one of them")
        if channels is not None and len(fs)!=channels:
            raise InputError(f"{path}: case {n!r} has {len(fs)} files, {_some_files(fs)}; expected {channels}, as "
                             f"channels= says. Complete the case, or correct channels=")
        if len(fs)>most:
            raise InputError(f"{path}: {len(fs)} files would be the channels of one case {n!r}: {_some_files(fs)}. If "
                             f"each is a scan of its own, say channels=1; if they are channels, say channels={len(fs)}")

def _check_numbers(cases, images):
    "Raise `InputError` where of `cases`, (name, files) each, two have as many channels of other numbers, or a file without a number stands beside numbered ones"
    seen = {}
    for n,fs in cases:
        numbers = [case_name(o).removeprefix(n)[1:] or '0000' for o in fs]
        first,want = seen.setdefault(len(fs), (n, numbers))
        if numbers!=want:
            raise InputError(f"{images}: case {n!r} has channel {', '.join(numbers)}, and case {first!r} has "
                             f"{', '.join(want)}; expected the same in all. "
                             "Complete the case, or leave it out")

def _case_keys(files):
    "{(open folders, name): files} of {(open folders, folder, name): files}. Raises `InputError` where a name stands twice"
    same = {}
    for (t,_,n),fs in files.items(): same.setdefault((t,n), []).append(fs)
    for (_,n),o in same.items():
        if len(o)>1:
            raise InputError(f"several files are called {n!r}: {_some_files([fs[0] for fs in o])}; expected one a "
                             f"case. Take one away, or give patterns of images and masks that leave open "
                                      "the same folders, such as images='*/images/*.nii.gz' and "
                                      "masks='*/labels/*.nii.gz', or tell the pairs in a DataFrame of your own")
    return {k:o[0] for k,o in same.items()}

def _by_folder(sides, patterns):
    "The same {(open folders, name): files}; the names give way where each folder is one case, such as `anna/image.nii.gz`"
    def alone(keys): return all(t for t,_ in keys) and len({t for t,_ in keys})==len(keys)
    one_name = any(o and not glob.has_magic(Path(p).name) for o,p in zip(sides, patterns))
    paired = not sides[1] or set(sides[0]) & set(sides[1])
    if not all(map(alone, sides)) or paired and not one_name: return sides
    return [{(t,''):fs for (t,_),fs in o.items()} for o in sides]

def scan_folder(
    path,                                # folder of the data set
    images:str='images/*.nii.gz',        # pattern of the images, below `path`
    masks:str|None='labels/*.nii.gz',    # pattern of the masks; None where there are none
    # files that make a case, `case_0000`, `case_0001` …; 1: each file is a case; default: found out, up to 8 or as many
    # as a `dataset.json` names
    channels:int|None=None
)->pd.DataFrame: # columns `case`, `image` (a whole path, or a list of them: channels), `mask`, and those of `cases.csv`
    "Pair images and masks by name; `case_0000`, `case_0001` … of one folder are the channels of `case`. Raises `FileNotFoundError` where nothing matches, `InputError` where nothing pairs or a name stands twice"
    path = Path(path).absolute()
    if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels<1):
        raise InputError(f"channels: expected a whole number from 1; found {channels!r}")
    masks = masks or None
    ims,im_in = _matches(path, 'images', images)
    ms,m_in = _matches(path, 'masks', masks) if masks is not None else ([],[])
    if not ims: raise MissingFileError(f"{path/images}: no image matches. Check `path` and `images=`")
    if masks is not None and not ms:
        raise MissingFileError(f"{path/masks}: no mask matches. Check `masks=`, or say masks=None")
    # their folders say nothing of who belongs to whom
    if ms and not set(im_in) & set(m_in):
        im_in,m_in = [()]*len(ims),[()]*len(ms)
    if both:=sorted(set(ims) & set(ms)):
        raise InputError(f"{path}: {_some_files(both)} would be image and mask at once: images={images!r} and "
                         f"masks={masks!r} both match. "
                         "Give patterns that tell them apart, such as 'images/*.nii.gz' and 'labels/*.nii.gz'")
    groups = _image_groups(ims, im_in, {(t,case_name(o)) for t,o in zip(m_in, ms)}, channels)
    _check_groups(path, groups, channels)
    _check_numbers([(n, fs) for (_,_,n),fs in groups.items()], images)
    found,truth = _by_folder([_case_keys(groups),
                              _case_keys({(t,i,case_name(o)):[o] for i,(t,o) in enumerate(zip(m_in, ms))})],
                              (images, masks))
    keys = list(dict.fromkeys([*found, *truth]))
    if ms and not any(k in truth for k in found):
        names = ['/'.join([*t, n]) for t,n in (next(iter(found)), next(iter(truth)))]
        raise InputError(f"{path}: no image has a mask of its name: {len(ims)} images such as {names[0]!r}, {len(ms)} "
                         f"masks such as {names[1]!r}. "
                         "Give both the same name, tell the pairs in a DataFrame of your own, or say masks=None")
    plain = len({n for _,n in keys})==len(keys) and all(n for _,n in keys)
    case = {(t,n):n if plain else '_'.join([*t, n] if n else t) for t,n in keys}
    if twice:=[c for c,k in Counter(case.values()).items() if k>1]:
        raise InputError(f"{path}: several cases would be called {twice[0]!r}: "
                         f"{_some_files([o for k in keys if case[k]==twice[0] for o in found.get(k, truth.get(k))])}. "
                         f"Rename a folder or a file")
    rows = [dict(case=case[k], image=_one_or_all(found[k]) if k in found else None, mask=first(truth.get(k, [])))
            for k in keys]
    df = pd.DataFrame(rows).sort_values('case', ignore_index=True).astype(object)
    if masks is None: df = df.drop(columns='mask')
    return _subjects(df, path)

def _decathlon_cases(info, path):
    "Rows, names of the labels and modalities of a Decathlon task; an image that is not there may be the `_0000`, `_0001` … of nnU-Net's first version"
    named = len(info.get('modality', {}))
    def images(p):
        fs = [] if p.exists() else sorted(
                p.parent.glob(f'{glob.escape(case_name(p))}_[0-9][0-9][0-9][0-9]{"".join(p.suffixes[-2:])}'))
        if len(fs)>(named or _few):
            raise InputError(f"{path/'dataset.json'}: case {case_name(p)!r} has {len(fs)} files, {_some_files(fs)}; "
                             f"expected {named or f'at most {_few}'} channels, as modality says. Correct the list, or "
                             f"remove "
                             f"what is too many")
        return _one_or_all(fs or [p])
    rows = [dict(case=case_name(o['image']), image=path/o['image'], mask=path/o['label']) for o in info['training']]
    if out:=[r['case'] for r in rows
            if any('..' in (r[k].relative_to(path) if r[k].is_relative_to(path) else r[k]).parts
            for k in ('image','mask'))]:
        raise FileError(f"{path/'dataset.json'}: {out[0]!r} leads out of the folder of the task. Correct the list")
    labels = {int(k):str(v) for k,v in info['labels'].items()}
    codes = [labels[k] for k in sorted(labels)] if sorted(labels)==list(range(len(labels))) else {labels[k]:k
            for k in sorted(labels)}
    if len(set(labels.values()))<len(labels):
        raise InputError(f"{path/'dataset.json'}: expected a name of its own for each label; found {labels}")
    return [{**r, 'image':images(r['image'])} for r in rows],codes,list(info.get('modality', {}).values())

def _nnunet_cases(info, path):
    "Rows, codes and channels of an nnU-Net data set: `imagesTr/case_0000.…` for each channel, `labelsTr/case.…`"
    fn,end,channels = path/'dataset.json',str(info['file_ending']),[str(v) for _,
            v in sorted(info['channel_names'].items(), key=lambda o: int(o[0]))]
    images,masks = {},{o.name.removesuffix(end):o for o in sorted((path/'labelsTr').iterdir()) if o.name.endswith(end)
            and not o.name.startswith('.')}
    for o in sorted((path/'imagesTr').iterdir()):
        if m:=re.fullmatch(rf'([^.].*)_\d{{4}}{re.escape(end)}', o.name): images.setdefault(m[1], []).append(o)
    if bad:=[k for k,fs in images.items() if len(fs)!=len(channels)]:
        raise InputError(f"{fn}: case {bad[0]!r} has {len(images[bad[0]])} files in imagesTr; expected {len(channels)} "
                         f"channels, {channels}. Complete the case, or remove it")
    _check_numbers(images.items(), path/'imagesTr')
    rows = [dict(case=k, image=_one_or_all(images.get(k) or [path/'imagesTr'/f'{k}_0000{end}']),
            mask=masks.get(k, path/'labelsTr'/f'{k}{end}')) for k in sorted({*images, *masks})]
    if len(rows)<(n:=int(info.get('numTraining', 0))):
        warn(f"{path}: {n-len(rows)} of the {n} cases that dataset.json counts are not there")
    if 'ignore' in info['labels']:
        warn(f"{fn}: the label 'ignore' ({info['labels']['ignore']}) is a structure like any other here: leave its "
             f"cases out, or give it to the background by codes=")
    codes = {str(k):v for k,v in info['labels'].items()}
    return rows,list(codes) if list(codes.values())==list(range(len(codes))) else codes,channels

def _one_or_all(fs): return fs[0] if len(fs)==1 else fs
def _there(fs): return fs is not None and all(o.exists() for o in L(fs))

def scan_decathlon(
    path, # folder with `dataset.json`
# columns `case`, `image`, `mask`, and those of `cases.csv`, whole paths; `df.attrs['codes']` holds the structures'
# names
)->pd.DataFrame:
    "The training cases of a Medical Segmentation Decathlon task, or of an nnU-Net data set. Raises `FileNotFoundError` where `dataset.json` is missing"
    path = Path(path).absolute()
    fn = path/'dataset.json'
    if not fn.exists():
        raise MissingFileError(f"{fn}: no such file. A Decathlon task has one; use scan_folder for other layouts")
    with reading(fn, 'the dataset.json of a Decathlon task or of nnU-Net', 'Download it again'):
        info = json.loads(fn.read_text(encoding='utf-8-sig'))
        kind = first(f for f,keys in ((_decathlon_cases, {'training','labels'}),
                (_nnunet_cases, {'channel_names','labels','file_ending'})) if keys<=set(info))
        if kind is None:
            raise FileError(f"{fn}: expected the keys training and labels (Decathlon), or channel_names, labels and "
                            f"file_ending (nnU-Net); found {list(info)[:12]}. "
                            "For another layout use scan_folder")
        rows,codes,modality = kind(info, path)
    if twice:=[k for k,n in Counter(r['case'] for r in rows).items() if n>1]:
        raise InputError(f"{fn}: expected each case once; {twice[:5]} stand there more than once. Correct the list")
    with reading(fn, 'names of files'): there = [r for r in rows if _there(r['image']) or _there(r['mask'])]
    if not there: raise MissingFileError(f"{path}: dataset.json lists {len(rows)} cases and none of their files exists")
    if len(there)<len(rows):
        warn(f"{path}: {len(rows)-len(there)} of the {len(rows)} cases that dataset.json lists are not there")
    for r in there: r.update({k:None for k in ('image','mask') if not _there(r[k])})
    df = _subjects(pd.DataFrame(there).astype(object), path)
    df.attrs.update(codes=codes, modality=modality)
    return df


# %% [markdown]
# A folder with two channels a case, one case without a mask and one mask without a case:

# %%
tmp = Path(tempfile.mkdtemp())
for f in ('images/anna_0000','images/anna_0001','images/bert_0000','images/bert_0001','images/._anna_0000',
          'labels/anna','labels/carl'):
    f += '.nii.gz'
    (tmp/f).parent.mkdir(exist_ok=True)
    (tmp/f).touch()
(tmp/'cases.csv').write_text('case,subject\nanna,1\nbert,1\ncarl,2\n')
df = scan_folder(tmp)
test_eq([len(o) if o is not None else 0 for o in df.image], [2,2,0])
df.assign(image=df.image.map(lambda o: o and [p.name for p in o]), mask=df['mask'].map(lambda o: o and o.name))

# %%
#| hide
test_fail(lambda: scan_folder(tmp, images='img/*.nii'), contains='img')
test_fail(lambda: scan_folder(tmp, masks='cases.csv'),
          contains="no image has a mask of its name: 4 images such as 'anna'")
test_fail(lambda: scan_decathlon(tmp), contains='dataset.json')
test_eq(case_name('a/sub 01.v2.nii.gz'), 'sub 01.v2')

# %% [markdown]
# Two sites that number their patients alike, and one folder a case. What the pattern leaves open (`*`) belongs to the name; channels are files of one folder, and no more than eight unless somebody says so.
#

# %%
sites = Path(tempfile.mkdtemp())
for f in ('a/images/p0','b/images/p0','a/labels/p0','b/labels/p0','carl/image','dora/image'):
    (sites/f).parent.mkdir(parents=True, exist_ok=True)
    (sites/f'{f}.nii.gz').touch()
test_eq(scan_folder(sites, '*/image.nii.gz', masks=None).case.tolist(), ['carl','dora'])
test_fail(lambda: scan_folder(sites, '*/images/*.nii.gz', 'a/labels/*.nii.gz'), contains='b/images/p0.nii.gz')
df = scan_folder(sites, '*/images/*.nii.gz', '*/labels/*.nii.gz')
test_eq(df.case.tolist(), ['a_p0','b_p0'])
df.assign(image=df.image.map(lambda o: str(o.relative_to(sites))),
        mask=df['mask'].map(lambda o: str(o.relative_to(sites))))


# %% [markdown]
# The real hippocampus task: 208 crops, two of each scan, so subjects are fewer than cases.

# %%
if os.environ.get('FASTMED_DATA'):
    hip = scan_decathlon(Path(os.environ['FASTMED_DATA'])/'hippocampus')
    display(hip.assign(image=hip.image.map(lambda o: o.name), mask=hip['mask'].map(lambda o: o.name)).head(3))
    print(len(hip), 'cases of', hip.subject.nunique(), 'subjects;', hip.attrs['codes'])


# %% [markdown]
# ## Names of the structures
#
# `codes` says what the values of a mask mean: a list of names for 0, 1, 2 …, or a dict of values. The background comes first, each value stands under one
# name, and each name once. Whatever else would be scored wrongly without a word, so it is refused by name.

# %%
#| exporti
def _whole_value(v):
    "A value of a mask as a plain integer; None where it is no whole number"
    if isinstance(v, (bool,np.bool_)) or not isinstance(v, (int,float,np.number)): return None
    return int(v) if np.isfinite(v) and v==int(v) else None

def _code_values(name, v):
    "The values of one structure: an integer, or a list of them"
    many = isinstance(v, (list,tuple,set,frozenset,range,L,pd.Series)) or isinstance(v, np.ndarray) and v.ndim==1
    whole = [_whole_value(o) for o in (v if many else [v])]
    if not whole or None in whole:
        raise InputError(
                f"codes: expected a whole number, or a list of them, as the value of {name!r}; found {str(v)[:80]}")
    return whole if many else whole[0]

def _refuse_shared(codes):
    "Raise `InputError` where a value stands under two names"
    seen = {}
    for name,v in codes.items():
        for o in set(L(v)):
            if o in seen:
                raise InputError(f"codes: value {o} stands under {seen[o]!r} and under {name!r}; expected each value "
                                 f"under one name, because a voxel "
                                 "is of one structure here. Nested regions are not trained on: name the parts, and "
                                 "merge them after the prediction")
            seen[o] = name

def _refuse_late_background(names, codes):
    "Raise `InputError` where the background is not first: the one of that name, else the one of value 0"
    k = next((i for i,n in enumerate(names) if n.strip().lower() in ('background','bg')), None)
    if k is None and isinstance(codes, dict): k = next((i for i,n in enumerate(names) if 0 in L(codes[n])), None)
    if not k: return
    order = [names[k]]+names[:k]+names[k+1:]
    fix = {n:codes[n] for n in order} if isinstance(codes, dict) else order
    raise InputError(f"codes: the background {names[k]!r} stands behind {names[0]!r}; expected it first, because the "
                     f"first name is never scored. "
                     + (f"Write codes={fix}" if isinstance(codes, dict) else f"Where the file's values follow this "
                                                                             f"order, say them: "
                                                                             f"codes={{{names[k]!r}:{k}, "
                                                                             f"{names[0]!r}:0, …}}"))

def check_codes(
    codes # None, a list of names for the values 0, 1, 2 …, or a dict name → value or values in the file
):        # the same, with names as text and values as plain integers
    "The names of the structures, background first. Raises `InputError` on a name or value that stands twice, and on a background that is not first"
    if codes is None: return None
    if not isinstance(codes, dict) and not isinstance(codes, (list,tuple,np.ndarray,L,pd.Series,pd.Index)):
        raise ArgumentError(f"codes: expected a list of names, or a dict name → value(s); found {codes!r}")
    names = [str(o) for o in codes]
    if not names:
        raise InputError("codes: expected at least the name of the background; found none. Leave codes out to take "
                         "them from the data")
    if twice:=[n for n,k in Counter(names).items() if k>1]:
        raise InputError(
                f"codes: expected a name of its own for each structure; {twice} stand there more than once in {names}")
    if not isinstance(codes, dict):
        _refuse_late_background(names, names)
        return names
    codes = {n:_code_values(n, v) for n,v in zip(names, codes.values())}
    _refuse_shared(codes)
    _refuse_late_background(names, codes)
    return codes


# %%
test_fail(lambda: check_codes({'background':0, 'WT':[1,2,3], 'TC':[1,3], 'ET':3}),
          contains="value 1 stands under 'WT' and under 'TC'")
test_fail(lambda: check_codes({'lesion':1, 'background':0}), contains="Write codes={'background': 0, 'lesion': 1}")
test_fail(lambda: check_codes(['background','lesion','lesion']), contains='more than once')
codes = check_codes({'background':np.int64(0), 'lesion':np.array([1,255])})
test_eq(codes, {'background':0, 'lesion':[1,255]})
json.dumps(codes)


# %% [markdown]
# ## Splits
#
# Two scans of one person look alike. If one trains the model and the other validates it, the score is of memory, not of skill. `GroupSplitter` keeps a
# subject on one side.

# %%
#| exporti
def check_columns(
    df # DataFrame, or a row of one
):     # the same
    "Raise `InputError` where the name of a column stands twice"
    names = df.columns if isinstance(df, pd.DataFrame) else df.index
    if not names.has_duplicates: return df
    twice = list(dict.fromkeys(names[names.duplicated()]))
    raise InputError(f"the DataFrame has two columns {twice[0]!r}{f' (and {twice[1:]})' if twice[1:] else ''}; "
                     f"expected each name once. "
                     "Rename one, or drop it: df.loc[:, ~df.columns.duplicated()]")

def case_at(
    df, # one row a case
    i   # number of the row
):      # its name: the column `case`, else that of the row
    "How errors call a case"
    row = df.iloc[int(i)]
    return row.get('case', row.name)

def marked_rows(
    df, # one row a case
    col # column of True and False, or of 1 and 0
)->np.ndarray: # (rows,) bool
    "The rows that a column marks. Raises `ColumnError` where there is none, `InputError` naming the case whose value is another"
    check_columns(df)
    if col not in df: raise ColumnError(f"valid_col {col!r}: not in the DataFrame, which has {list(df)}")
    for i,v in enumerate(df[col]):
        if not isinstance(v, (bool,np.bool_,int,float,np.number)) or v not in (0,1):
            case = df['case'].iloc[i] if 'case' in df else df.index[i]
            raise InputError(f"case {case!r}: {col} is {v!r}; expected True or False, or 1 and 0, in every row. Fill "
                             f"it in; of a column of folds mark one: df.assign(is_valid=df[{col!r}]==0)")
    return df[col].astype(bool).values


# %%
#| exporti
def case_splitter(
    df,        # one row a case
    group_col, # column whose groups are never parted, or None
    valid_col, # column that marks validation, or None
    valid_pct, # share of the groups that validate
    seed       # of the draw
):             # a splitter: items → (training, validation) indices
    "How the cases of a table are split. Raises `ColumnError`, `InputError`"
    if group_col is None and 'subject' in df: group_col = 'subject'
    if group_col is not None and group_col not in df:
        raise ColumnError(f"group_col {group_col!r}: not in the DataFrame, which has {list(df)}")
    if valid_col is not None:
        v = marked_rows(df, valid_col)
        if v.all() or not v.any():
            raise InputError(f"valid_col {valid_col!r}: expected some cases to train and some to validate; found "
                             f"{v.sum()} of {len(v)} marked")
        if group_col is not None:
            both = sorted(set(df[group_col][v].astype(str)) & set(df[group_col][~v].astype(str)))
            if both:
                raise InputError(f"valid_col {valid_col!r} puts {group_col} {both[:5]} on both sides of the split "
                                 f"({len(both)} in all). Keep each on one side")
        return lambda o: (L(np.flatnonzero(~v).tolist()), L(np.flatnonzero(v).tolist()))
    if not 0<valid_pct<1: raise InputError(f"valid_pct: expected a share between 0 and 1; found {valid_pct}")
    return GroupSplitter(df[group_col] if group_col is not None else range(len(df)), valid_pct, seed)


# %%
#| exporti
def group_values(
    df,        # one row a case
    group_col  # name of a column, or None
):             # Series of text, a row a case
    "The group of each row as text: of `group_col`, else `subject`, else each row its own"
    if group_col is None and 'subject' in df: group_col = 'subject'
    if group_col is None:
        return pd.Series(np.arange(len(df)).astype(str) if 'case' not in df else df['case'].astype(str).values)
    if group_col not in df: raise ColumnError(f"group_col {group_col!r}: not in the DataFrame, which has {list(df)}")
    if (na:=df[group_col].isna()).any():
        r = df[na].iloc[0]
        raise InputError(f"case {r.get('case', r.name)!r} has no {group_col}. Fill the column")
    return df[group_col].astype(str).reset_index(drop=True)


# %%
#| exporti
def warn_twins(
    df,    # one row a case
    files, # files of each case
    train  # indices of the training cases
):
    "Warn where one content stands on both sides of a split: in files of other names too, as long as they are of one kind"
    seen,train = {},set(train)
    for i,fs in enumerate(files):
        for f in fs if is_listy(fs) else [fs]:
            if (k:=_content(f)) is not None: seen.setdefault(k, []).append(i)
    both = [(next(i for i in v if i in train), next(i for i in v if i not in train)) for v in seen.values()
            if {i in train for i in v}=={True,False}]
    if both:
        a,b = (df.iloc[i].get('case', i) for i in both[0])
        warn(f"{len(both)} images stand on both sides of the split, such as that of case {a!r} (training), which is "
             f"that of case {b!r} (validation): the score will be of memory. Drop one of them, or give both one "
             f"subject. find_leaks(df) looks deeper")


# %%
#| export
def GroupSplitter(
    groups,             # group of each item, such as the subject
    valid_pct:float=.2, # share of the items, reached as nearly as whole groups allow
    seed:int=42         # of the draw
):                      # function: items → (training indices, validation indices)
    "A splitter that never parts a group. Raises `ValueError` where there are fewer than two groups or a group is missing"
    groups = pd.Series(list(groups))
    if (na:=groups.isna()).any():
        raise InputError(f"GroupSplitter: {int(na.sum())} items have no group, the first is number {int(na.idxmax())}. "
                         f"Fill the column")
    counts = groups.astype(str).value_counts().sort_index()
    if len(counts)<2:
        raise InputError(f"GroupSplitter: expected at least two groups to split; found {len(counts)} "
                         f"({counts.index.tolist()}) in {len(groups)} items. "
                         "Give more subjects, or group_col with finer groups")
    order = np.random.default_rng(seed).permutation(len(counts))
    want,valid,n = valid_pct*len(groups),[],0
    for k in order[:-1]:
        if valid and n+counts.iloc[k]/2>want: break
        valid.append(counts.index[k])
        n += counts.iloc[k]
    v = groups.astype(str).isin(valid).values
    def _inner(o):
        assert len(o)==len(v), f"GroupSplitter was made for {len(v)} items and got {len(o)}"
        return L(np.flatnonzero(~v).tolist()), L(np.flatnonzero(v).tolist())
    return _inner

def group_folds(
    df,             # one row a case
    n:int=5,        # folds
    seed:int=42,    # of the draw
    group_col=None  # column whose groups are never parted; default 'subject' where it exists
)->np.ndarray:      # (rows,) number of the fold that holds each case out
    "Folds of about equal size that never part a group, the same for the same cases in any order. Raises `ValueError` on fewer groups than folds"
    from sklearn.model_selection import GroupKFold
    groups = group_values(df, group_col)
    if n<2: raise InputError(f"folds: expected 2 or more; found {n}")
    if groups.nunique()<n:
        raise InputError(f"folds: {n} folds need at least {n} groups; found {groups.nunique()} in {len(df)} cases. Ask "
                         f"for fewer folds")
    order = np.lexsort([df['case'].astype(str) if 'case' in df else groups, groups])
    res = np.empty(len(df), int)
    for k,(_,held) in enumerate(GroupKFold(n, shuffle=True, random_state=seed).split(order,
            groups=groups.values[order])):
        res[order[held]] = k
    return res

def _content(fn):
    "What tells one content from another without unpacking it: of a .gz the checksum at its end, else size and the bytes at both ends; None where there is no such file"
    try:
        with open(fn, 'rb') as f:
            n = f.seek(0, 2)
            f.seek(max(0, n-8))
            end = f.read(8)
            if str(fn).lower().endswith('.gz'): return end
            return n,*(hashlib.blake2b((f.seek(k), f.read(2**14))[1], digest_size=16).digest()
                       for k in (0, n//2, max(0, n-2**14)))
    except (OSError, ValueError, TypeError): return None


# %%
sp = GroupSplitter(['a','a','b','b','c','c','d','d','e','e'], .2)(range(10))
test_eq(len(sp[1]), 2)
assert sp[1][0]//2==sp[1][1]//2
test_fail(lambda: GroupSplitter(['a','a']), contains='two groups')
import gzip
for n in 'ab': (tmp/f'{n}.nii.gz').write_bytes(gzip.compress(b'one scan', mtime=ord(n)))
(tmp/'c.nii.gz').write_bytes(gzip.compress(b'another!'))
fs = [tmp/f'{n}.nii.gz' for n in 'abc']
df = pd.DataFrame(dict(case=list('abc')))
with warnings.catch_warnings(record=True) as w:
    warnings.simplefilter('always')
    warn_twins(df, fs, [0,2])
assert w
test_eq(_content(fs[0]), _content(fs[1]))
import warnings
with warnings.catch_warnings():
    warnings.simplefilter('error')
    warn_twins(df, fs, [0,1])
    warn_twins(df, [[fs[0],tmp/'none.nii'], fs[1], tmp], [0,1])
test_fail(lambda: case_splitter(pd.DataFrame(dict(subject=[1,1,2], v=[0,1,0])), None, 'v', .2, 42),
          contains='both sides')
test_eq(marked_rows(pd.DataFrame(dict(v=[0,1,0])), 'v'), [False,True,False])
test_fail(lambda: marked_rows(pd.DataFrame(dict(case=['a','b'], fold=[0,2])), 'fold'), contains="case 'b': fold is 2")
sp
