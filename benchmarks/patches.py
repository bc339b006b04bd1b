"""64³ four-channel patches a second, with their masks, from whole brains (ms_lesions: 2 patients, 182×218×182), by five
ways of serving them.

    FASTMED_DATA=… python benchmarks/patches.py          # about 5 minutes on two cores

fastmed        the stored volumes through `VolumeDataLoaders`, two workers, batches of 4, no batch augmentation
bare, 0 and 2  the same stored arrays: `np.load(mmap_mode='r')`, a slice, a copy, `torch.stack`; in this process, and in
a DataLoader with two workers
torchio        `Queue` with `UniformSampler` and two workers on the files as they were downloaded, with
               `ToCanonical` and `ZNormalization`, as its users have them
torchio stored the same Queue on the preprocessed volumes in uncompressed NIfTI, with no transform left to do: kinder to
it than its users are
monai          `PersistentDataset` (read, reoriented and normalised once, then from its cache) and
               `RandSpatialCropSamplesd`, two workers

Each runs in a process of its own, twice, in turned order; the start (workers, the first queue) is not timed. TorchIO
and MONAI get the list of patients many times over, so that
their workers never restart, and as many patches from a read volume as `--per-volume` says.
"""
import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import child, here, keep, quiet

size,bs,workers = (64,64,64),4,2
ways = ['fastmed','bare 0','bare 2','torchio','torchio stored','monai']

def table():
    from fastmed.all import scan_folder
    return scan_folder(Path(os.environ['FASTMED_DATA'])/'ms_lesions')

def loaders(n):
    """fastmed's DataLoaders; the first patient stands a second time as the validation case that fastai wants and
    nothing reads here"""
    import pandas as pd

    from fastmed.all import VolumeDataLoaders
    df = table()
    df = pd.concat([df.assign(valid=False), df.iloc[:1].assign(valid=True)], ignore_index=True)
    with quiet():
        return VolumeDataLoaders.from_df(df, valid_col='valid', codes={'background':0,'lesion':1}, patch=size, bs=bs,
                                         samples_per_case=n, batch_tfms=None, num_workers=workers, device='cpu')

def stored():
    "Files of the stored arrays: (image, mask) of each patient"
    from fastmed.all import Store
    dls = loaders(1)
    pre = dls.preprocess
    return [(dls.store.entry('image', r.image)/'data.npy',
             Store(pre, dls.store.path).entry('mask', r['mask'])/'data.npy') for _,r in table().iterrows()]

def served(dl, count):
    while True:
        for b in dl: yield count(b)

def from_fastmed(a):
    dl = loaders(5000).train
    return served(dl, lambda b: len(b[0]))

class Mapped(torch.utils.data.Dataset):
    def __init__(self, files): self.arrays = [(np.load(i, mmap_mode='r'), np.load(m, mmap_mode='r')) for i,m in files]
    def __len__(self): return 10_000
    def __getitem__(self, k):
        rng = np.random.default_rng(k)
        x,y = self.arrays[k%len(self.arrays)]
        sl = tuple(slice(c, c+p) for c,p in zip(rng.integers(0, np.array(y.shape)-size+1), size))
        return torch.from_numpy(np.array(x[(slice(None),*sl)])),torch.from_numpy(np.array(y[sl]))

def from_bare(a, workers):
    ds = Mapped(stored())
    if workers: return served(torch.utils.data.DataLoader(ds, bs, num_workers=workers), lambda b: len(b[0]))
    def batches():
        for k in itertools.count(step=bs): yield len([torch.stack(o) for o in zip(*[ds[k+i] for i in range(bs)])][0])
    return batches()

def queue(a, subjects, transform):
    import torchio as tio
    q = tio.Queue(tio.SubjectsDataset(subjects*200, transform=transform), max_length=a.queue,
                  samples_per_volume=a.per_volume, sampler=tio.UniformSampler(size), num_workers=workers)
    return served(tio.SubjectsLoader(q, batch_size=bs, num_workers=0), lambda b: len(b['image']['data']))

def from_torchio(a):
    import torchio as tio
    subjects = [tio.Subject(image=tio.ScalarImage([str(o) for o in r.image]), mask=tio.LabelMap(str(r['mask']))) for _,
            r in table().iterrows()]
    return queue(a, subjects, tio.Compose([tio.ToCanonical(), tio.ZNormalization()]))

def from_torchio_stored(a):
    import nibabel as nib
    import torchio as tio
    tmp,subjects = Path(a.tmp),[]
    for k,(i,m) in enumerate(stored()):
        for n,f in (('image',i),('mask',m)):
            x = np.load(f)
            if not (tmp/f'{k}{n}.nii').exists():
                nib.save(nib.Nifti1Image(np.moveaxis(x, 0, -1) if n=='image' else x, np.eye(4)), tmp/f'{k}{n}.nii')
        subjects.append(tio.Subject(image=tio.ScalarImage(tmp/f'{k}image.nii'), mask=tio.LabelMap(tmp/f'{k}mask.nii')))
    return queue(a, subjects, None)

def from_monai(a):
    from monai.data import DataLoader, PersistentDataset
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        RandSpatialCropSamplesd,
    )
    ks = ['image','mask']
    ts = Compose([LoadImaged(ks), EnsureChannelFirstd(ks), Orientationd(ks, 'RAS', labels=None),
            NormalizeIntensityd('image', channel_wise=True),
                  RandSpatialCropSamplesd(ks, size, num_samples=a.per_volume, random_size=False)])
    # with the defaults MetaTensors do not load again, and every item is made anew
    ds = PersistentDataset([dict(image=[str(o) for o in r.image], mask=str(r['mask'])) for _,
                           r in table().iterrows()]*200, ts, Path(a.tmp)/'monai', weights_only=False, track_meta=True)
    for k in range(2): ds[k]                             # the cache is filled before the clock runs
    return served(DataLoader(ds, batch_size=1, num_workers=workers), lambda b: len(b['image']))

def measure(a):
    "Patches a second of one way, over whole rounds of its queue"
    make = {'fastmed':from_fastmed, 'bare 0':lambda a: from_bare(a, 0), 'bare 2':lambda a: from_bare(a, workers),
            'torchio':from_torchio, 'torchio stored':from_torchio_stored, 'monai':from_monai}
    round_ = {'monai':a.per_volume*workers, 'torchio':a.queue, 'torchio stored':a.queue}.get(a.one, 4*bs)
    it = make[a.one](a)
    def go(n):
        k = 0
        while k<n: k += next(it)
        return k
    go(round_)
    n,t0 = 0,time.perf_counter()
    while n<a.patches or time.perf_counter()-t0<a.seconds: n += go(round_)
    s = time.perf_counter()-t0
    return dict(patches=n, seconds=s)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seconds', type=float, default=10., help='at least, a run')
    p.add_argument('--patches', type=int, default=200, help='at least, a run')
    p.add_argument('--repeats', type=int, default=2)
    p.add_argument('--per-volume', type=int, default=10, help='patches from a volume that TorchIO or MONAI has read')
    p.add_argument('--queue', type=int, default=40, help="length of TorchIO's Queue")
    p.add_argument('--ways', nargs='+', default=ways, choices=ways)
    p.add_argument('--one', help=argparse.SUPPRESS)
    p.add_argument('--tmp', help=argparse.SUPPRESS)
    p.add_argument('--out', default=here/'patches.csv')
    a = p.parse_args()
    if a.one: print('\n'+json.dumps(measure(a)))
    else:
        stored()
        got = {k:[] for k in a.ways}
        with tempfile.TemporaryDirectory() as tmp:
            for i in range(a.repeats):
                for k in a.ways[::1 if i%2==0 else -1]:
                    r = child(__file__, '--one', k, '--tmp', tmp, '--seconds', a.seconds, '--patches', a.patches,
                              '--per-volume', a.per_volume, '--queue', a.queue)
                    got[k].append(r['patches']/r['seconds'])
        ref = {k:max(v) for k,v in got.items()}
        keep([dict(way=k, per_volume=a.per_volume if k.split()[0] in ('torchio','monai') else None,
                queue=a.queue if k.startswith('torchio') else None, runs=' '.join(f'{o:.1f}' for o in v),
                   patches_a_second=round(ref[k], 1), times_torchio=round(ref[k]/ref['torchio'], 2) if 'torchio' in ref
                   else None, times_torchio_stored=round(ref[k]/ref['torchio stored'], 2) if 'torchio stored' in ref
                   else None)
              for k,v in got.items()], a.out, ['way','per_volume','queue'])
