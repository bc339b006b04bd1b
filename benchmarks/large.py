"""A scan far larger than any patch: peak memory, time and cover of `predict_volume` in a fresh process, for a 300³
NIfTI file; and the spine scans on their own grids.

    FASTMED_DATA=… python benchmarks/large.py            # about 12 minutes on two cores

A Learner of default size (16 features, 4 levels) is trained for moments on phantoms of two balls, with patches of
40×56×40 and of 96³, and exported. The large scan is a block of
5×5×5 phantoms, stored as int16 .nii.gz in the order LPS. `peak` is the most the predicting process held, everything
included; `added` is what prediction put on top of the
loaded Learner. `dice_worst_block` is the lowest foreground Dice of the 125 blocks, the corners among them. `covered`:
once the network's last bias is raised so that it must say
class 1 wherever it looks, every voxel of the mask is 1.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from common import child, here, keep, peak, quiet, reset_peak, rss


def write(fn, a, affine):
    nib.openers.Opener.default_compresslevel = 1
    nib.save(nib.Nifti1Image(a, affine), fn)
    return fn

def train(patch, bs, updates, tmp):
    "A Learner on phantoms, exported"
    import pandas as pd

    from fastmed.all import VolumeDataLoaders, phantom, set_seed, unet3d_learner
    set_seed(0)
    shape,rows = [p+4 for p in patch],[]
    for k in range(5):
        im,m = phantom(shape, seed=k, radius=None if k%2 else .2*min(shape))
        nib.save(im, f:=tmp/f'{patch[0]}_{k}.nii')
        nib.save(m, g:=tmp/f'{patch[0]}_{k}_mask.nii')
        rows.append(dict(case=str(k), image=f, mask=g))
    with quiet():
        dls = VolumeDataLoaders.from_df(pd.DataFrame(rows), path=tmp, codes=['background','large','small'], patch=patch,
                                        bs=bs, samples_per_case=-(-updates*bs//4), valid_pct=.2, cache=tmp/'store',
                                        device='cpu')
    learn = unet3d_learner(dls)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    learn.export(fn:=f'{patch[0]}.pkl')
    return tmp/fn

def big(n, tmp, tile=60):
    "Blocks of phantoms, image and truth"
    from fastmed.all import phantom
    im,m = [np.asanyarray(o.dataobj) for o in phantom((tile,)*3)]
    reps = (-(-n//tile),)*3
    cut = (slice(n),)*3
    rng = np.random.default_rng(1)
    x = np.tile((im*1000).astype(np.int16), reps)[cut]
    for i in range(n): x[i] += rng.integers(-20, 21, x.shape[1:], dtype=np.int16)
    aff = np.diag([-1.,-1.,1.,1.])
    aff[:3,3] = n/2,n/2,-n/2
    return write(tmp/f'big_{n}.nii.gz', x, aff),write(tmp/f'big_{n}_mask.nii.gz', np.tile(m, reps)[cut], aff)

def predict(a):
    "What the fresh process does"
    from fastmed.all import load_learner
    learn = load_learner(a.learner)
    before = rss()
    reset_peak()
    with quiet():
        t0 = time.perf_counter()
        m = learn.predict_volume(a.fn)
        s = time.perf_counter()-t0
    most = peak()
    m.save(out:=Path(a.learner).with_suffix('.nii.gz'))
    was,now = nib.load(a.fn),nib.load(out)
    r = dict(seconds=s, peak=most, added=most-before, shape='×'.join(map(str, was.shape[:3])),
            orientation=m.orientation, spacing='×'.join(f'{o:.3g}' for o in m.spacing),
             same_shape=now.shape==was.shape[:3], same_affine=bool(np.allclose(now.affine, was.affine, atol=1e-5)))
    if a.truth:
        t,p = (np.asanyarray(o.dataobj)>0 for o in (nib.load(a.truth),now))
        ds = [2*(t[sl]&p[sl]).sum()/max(1, t[sl].sum()+p[sl].sum()) for i in np.ndindex(*(-(-n//60) for n in t.shape))
              for sl in [tuple(slice(60*k, 60*k+60) for k in i)] if t[sl].any()]
        r.update(dice=2*float((t&p).sum())/max(1, int(t.sum())+int(p.sum())), dice_worst_block=float(min(ds)))
    if a.cover:
        learn.model.heads[-1].bias.data[1] += 1e6
        with quiet(): r['covered'] = bool((learn.predict_volume(a.fn)==1).all())
    print('\n'+json.dumps(r))

def row(what, patch, r, cover=True):
    return dict(what=what, patch='×'.join(map(str, patch)), shape=r['shape'], orientation=r['orientation'],
            spacing=r['spacing'], seconds=round(r['seconds'], 1), peak_gb=round(r['peak']/1e9, 3),
            added_gb=round(r['added']/1e9, 3),
                same_shape=r['same_shape'], same_affine=r['same_affine'], covered=r.get('covered'),
                dice=round(r['dice'], 4) if 'dice' in r else None, dice_worst_block=round(r['dice_worst_block'], 4)
                if 'dice' in r else None)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, default=300)
    p.add_argument('--updates', type=int, default=60, help='of the small patch; the large one gets a third')
    p.add_argument('--patches', type=int, nargs='+', default=[40,96], help='which of the two: 40 stands for 40×56×40')
    p.add_argument('--no-cover', dest='cover', action='store_false', help='leave the second prediction out')
    p.add_argument('--no-spine', dest='spine', action='store_false')
    p.add_argument('--use', type=Path,
                   help='an exported 3D Learner, in place of the two that are trained here: say, that of '
                        '`hippocampus.py --out`')
    p.add_argument('--learner', help=argparse.SUPPRESS)
    p.add_argument('--fn', help=argparse.SUPPRESS)
    p.add_argument('--truth', help=argparse.SUPPRESS)
    p.add_argument('--out', default=here/'large.csv')
    a = p.parse_args()
    if a.learner:
        predict(a)
        sys.exit()
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        fn,truth = big(a.size, tmp)
        # beside its export the mask is written
        if a.use:
            learners = {a.use.parent.name:shutil.copy(a.use, tmp)}
        else:
            learners = {s:train((40,56,40) if s==40 else (s,)*3, 4 if s==40 else 1,
                                a.updates if s==40 else -(-a.updates//3), tmp) for s in a.patches}
        for s,f in learners.items():
            patch = (40,56,40) if s==40 else (s,)*3
            if a.use: patch = (s,)
            cover = [] if a.cover else ['--no-cover']
            rows.append(row(f'{a.size}³', patch,
                    child(__file__, '--learner', f, '--fn', fn, *([] if a.use else ['--truth', truth]), *cover)))
            if a.spine and s!=96:
                for n in ('t1','t2','t2s','mt1'):
                    scan = Path(os.environ['FASTMED_DATA'])/'spine'/f'{n}.nii.gz'
                    rows.append(row(f'spine {n}', patch, child(__file__, '--learner', f, '--fn', scan, *cover)))
    keep(rows, a.out, ['what','patch'])
    bad = [r['what'] for r in rows if not (r['same_shape'] and r['same_affine'] and r['covered'] is not False)]
    if bad: sys.exit(f'shape, affine or cover is wrong: {bad}')
