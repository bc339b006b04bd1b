"""A scan of a clinic's size with a hundred structures: seconds and peak memory of `predict_volume`, file to mask, in a
fresh process.

    python benchmarks/classes.py                         # 512×512×400, 100 classes, windows of 64³
    python benchmarks/classes.py --size 128 128 100

The network is a convolution of 1×1×1 with random weights, so that what is measured is what a hundred classes cost: to
be answered, added up and decided between.
`network_s` are the seconds that even this network took. `added_gb` is what prediction put on top of the process that
holds the Learner.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from common import child, here, keep, peak, quiet, reset_peak, rss


def learner(tmp, classes, patch):
    "A Learner with so many structures, not trained"
    import pandas as pd

    from fastmed.all import VolumeDataLoaders, set_seed, unet3d_learner
    set_seed(0)
    rng,rows = np.random.default_rng(0),[]
    for k in range(2):
        for n,a in (('image', rng.normal(100, 20, (patch,)*3).astype(np.float32)),
                ('mask', rng.integers(0, classes, (patch,)*3).astype(np.uint8))):
            nib.save(nib.Nifti1Image(a, np.eye(4)), tmp/f'{n}{k}.nii')
        rows.append(dict(case=str(k), image=tmp/f'image{k}.nii', mask=tmp/f'mask{k}.nii'))
    codes = ['background']+[f'structure {k}' for k in range(1, classes)]
    dls = VolumeDataLoaders.from_df(pd.DataFrame(rows), path=tmp, codes=codes, patch=patch, bs=1, samples_per_case=1,
                                    valid_pct=.5, cache=tmp/'store', device='cpu')
    learn = unet3d_learner(dls, nf=4, depth=2)
    learn.model = Point(classes)
    return learn

class Point(torch.nn.Module):
    "Each voxel by itself, and how long that took"
    def __init__(self, classes):
        super().__init__()
        self.layer,self.seconds = torch.nn.Conv3d(1, classes, 1),0.
    def forward(self, x):
        t = time.perf_counter()
        res = self.layer(x)
        self.seconds += time.perf_counter()-t
        return res

def scan(fn, shape):
    "A file of noise, written a plane at a time"
    h = nib.Nifti1Image(np.zeros((1,1,1), np.int16), np.eye(4)).header.copy()
    h.set_data_shape(shape)
    rng = np.random.default_rng(0)
    with open(fn, 'wb') as f:
        h['magic'],h['vox_offset'] = b'n+1',352
        f.write(h.binaryblock+b'\0'*4)
        for _ in range(shape[2]): f.write(rng.integers(0, 200, shape[:2], dtype=np.int16).tobytes(order='F'))
    return fn

def run(a):
    "What the fresh process does"
    with tempfile.TemporaryDirectory() as tmp, quiet():
        tmp = Path(tmp)
        learn,fn = learner(tmp, a.classes, a.patch),scan(tmp/'scan.nii', a.size)
        learn.model.seconds = 0.
        before,t,c = rss(),time.perf_counter(),time.process_time()
        reset_peak()
        mask = learn.predict_volume(fn)
        seconds,cpu,most = time.perf_counter()-t,time.process_time()-c,peak()
    assert tuple(mask.shape)==tuple(a.size)
    return dict(seconds=seconds, cpu=cpu, network=learn.model.seconds, peak=most, added=most-before)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, nargs=3, default=[512,512,400])
    p.add_argument('--classes', type=int, default=100)
    p.add_argument('--patch', type=int, default=64)
    p.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
    p.add_argument('--csv', default=here/'classes.csv')
    a = p.parse_args()
    if a.one:
        print('\n'+json.dumps(run(a)))
        sys.exit()
    r = child(__file__, '--one', '--size', *a.size, '--classes', a.classes, '--patch', a.patch)
    keep([dict(size='×'.join(map(str, a.size)), classes=a.classes, patch=a.patch, seconds=round(r['seconds'], 1),
            cpu_s=round(r['cpu'], 1), network_s=round(r['network'], 1),
               peak_gb=round(r['peak']/1e9, 2), added_gb=round(r['added']/1e9, 2))], a.csv, ['size','classes','patch'])
