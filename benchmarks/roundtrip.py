"""Masks there and back: `python benchmarks/roundtrip.py --examples 2000` draws that many scans by hypothesis
(tests/test_roundtrip.py says what, and derives the bound), and keeps the least Dice of each class in roundtrip.csv.

`mask`: any labels in any shape, on disk in any type; `ball`: a ball of at least 3 pipeline voxels radius; `prediction`:
through `predict_volume` of a network that says 1 above one half; `constant`, `linear`: images. The class is the largest
t/s of the three axes:
the pipeline's spacing over the scan's. `least_dice` is over the structures of all examples, `its_bound` what that one
had to keep, `least_margin` the smallest Dice minus bound; `sure`: the share of voxels that could not change."""
import argparse
import collections
import itertools
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here.parent/'tests')]
import test_roundtrip as R
from common import keep
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CLASSES = ((1.001,'at most 1'), (2,'1 to 2'), (4,'2 to 4'), (1e9,'above 4'))
def ratio_class(r): return next(n for m,n in CLASSES if max(r)<=m)

def learner(d):
    "A Learner whose network needs no training"
    import nibabel as nib
    import pandas as pd
    from phantoms import Nearest

    from fastmed.all import VolumeDataLoaders, unet3d_learner
    for i in range(4):
        a = np.random.default_rng(i).random((8,8,8)).astype(np.float32)
        nib.save(nib.Nifti1Image(a, np.eye(4)), d/f'{i}.nii')
        nib.save(nib.Nifti1Image((a>.5).astype(np.uint8), np.eye(4)), d/f'm{i}.nii')
    df = pd.DataFrame([dict(case=i, subject=i, image=d/f'{i}.nii', mask=d/f'm{i}.nii') for i in range(4)])
    import fastprogress
    fastprogress.fastprogress.NO_BAR = True
    learn = unet3d_learner(VolumeDataLoaders.from_df(df, codes=['background','a'], patch=16, bs=2, num_workers=0,
                                                     device='cpu', cache=d/'c', path=d), nf=4, depth=2)
    learn.model = Nearest(1, 2)
    learn.n_out = 2
    return learn

class Notes:
    "What came of the examples: rows by (what, order of resampling, class of ratio), and the errors seen"
    def __init__(self):
        new = dict(examples=0, failures=0, least_dice=1., its_bound=1., least_margin=1.)
        self.rows,self.seen = collections.defaultdict(lambda: dict(new)),[]

    def note(self, what, order, f):
        try: got = f()
        except Exception:
            self.seen.append((what, traceback.format_exc()))
            o = self.rows[what,order,'any']
            o['examples'] += 1
            o['failures'] += 1
            return
        if got is None: return
        r,d,b = got if len(got)==3 else (got[0],1.,1.)
        o = self.rows[what,order,ratio_class(r)]
        o['examples'] += 1
        o['least_margin'] = min(o['least_margin'], d-b)
        if d<o['least_dice']: o.update(least_dice=d, its_bound=b)

    def table(self):
        order = [n for _,n in CLASSES]+['any']
        def short(r): return {k:round(v, 4) if isinstance(v, float) else v for k,v in r.items()}
        found = sorted(self.rows.items(), key=lambda i: (i[0][0], i[0][1], order.index(i[0][2])))
        every = self.rows.values()
        return [*(dict(what=w, order=o, ratio=c, **short(r)) for (w,o,c),r in found),
                dict(what='all', order='', ratio='any', examples=sum(r['examples'] for r in every),
                     failures=sum(r['failures'] for r in every),
                     least_margin=round(min(r['least_margin'] for r in every), 4))]

def draw(n, *s):
    "Decorator: the function is called with `n` examples"
    asked = settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    return lambda f: asked(given(*s)(f))

def masks_and_predictions(notes, n, d):
    "Masks there and back, balls, and predictions of a network, with files in the folder `d`"
    q = max(1, n//4)
    @draw(n, R.scans)
    def masks(o): notes.note('mask', o[-1], lambda: R.there_and_back(*o, d))
    @draw(q, R.balls())
    def balls(o):
        notes.note('ball', 'smooth', lambda: R.there_and_back(*o[:3], ('u1','<',None,'.nii'), 'smooth', d))
    learn = learner(d)
    @draw(q, R.grids(), st.data())
    def predictions(g, data):
        m = (data.draw(R.labels(g[0]))>0).astype(np.uint8)
        mm,order = data.draw(st.one_of(st.none(), R.targets(*g))),data.draw(st.sampled_from(('smooth','nearest')))
        notes.note('prediction', order, lambda: R.predicted(learn, m, g[1], mm, order, d))
    masks()
    balls()
    predictions()

def property_of_a_test(notes, what, test, n):
    "A test of the suite, with `n` examples"
    inner,own,count = test.hypothesis.inner_test,test._hypothesis_internal_use_settings,itertools.count()
    def counted(*args, **kw):
        next(count)
        return inner(*args, **kw)
    test.hypothesis.inner_test = counted
    test._hypothesis_internal_use_settings = settings(own, max_examples=n, derandomize=False)
    fails = 0
    try: test()
    except Exception:
        fails = 1
        notes.seen.append((what, traceback.format_exc()))
    finally: test.hypothesis.inner_test,test._hypothesis_internal_use_settings = inner,own
    notes.rows[what,'','any'].update(examples=next(count), failures=fails)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--examples', type=int, default=2000, help='of masks; a quarter as many of each of the others')
    p.add_argument('--out', default=str(here/'roundtrip.csv'))
    a = p.parse_args()
    torch.set_num_threads(1)
    t0,notes = time.perf_counter(),Notes()
    with tempfile.TemporaryDirectory() as d: masks_and_predictions(notes, a.examples, Path(d))
    for what,test in (('constant',R.test_a_constant_stays_constant),
                      ('linear',R.test_linear_resampling_adds_no_value_beyond_the_old_ones)):
        property_of_a_test(notes, what, test, max(1, a.examples//4))
    for what,tb in notes.seen[:5]: print(what, tb[-1500:], file=sys.stderr)
    keep(notes.table(), a.out, by=['what','order','ratio'])
    print(f'{time.perf_counter()-t0:.0f} s')
    sys.exit(1 if notes.seen else 0)

if __name__=='__main__': main()
