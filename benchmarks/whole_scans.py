"""Whole scans at full size: four channels (ms_lesions, 182×218×182) and fifteen classes (ixi_brains, 120×120×90, 149
label values put together in 14 groups).

    FASTMED_DATA=… python benchmarks/whole_scans.py --minutes 1      # both sets, about 6 minutes on two cores

Each set is read, stored, trained for `--minutes` with the defaults, exported, and its validation cases are predicted
and scored by the exported Learner in a fresh process.
The point is that it runs, in what memory, and how long a scan takes; a minute of training promises no Dice, and two
patients promise none after an hour.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import child, here, keep, peak, quiet, reset_peak


def table(name):
    "Cases and codes of a set"
    from fastmed.all import Preprocess, Store, cache_dir, scan_folder
    from fastmed.data.store import label_values
    df = scan_folder(Path(os.environ['FASTMED_DATA'])/name)
    if name=='ms_lesions': return df.assign(valid=lambda d: d.index==len(d)-1), {'background':0,'lesion':1}
    values = label_values(Store(Preprocess(), cache_dir()), df['mask'].tolist())
    groups = np.array_split([v for v in values if v], 14)                # neighbours in the list of values go together
    return df.assign(valid=lambda d: d.index>=len(d)-2), {'background':[0],
            **{f'labels {g[0]}-{g[-1]}':[int(v) for v in g] for g in groups}}

def train(a):
    from fastmed.all import VolumeDataLoaders, set_seed, unet3d_learner
    set_seed(42)
    df,codes = table(a.set)
    reset_peak()
    t0 = time.perf_counter()
    with quiet():
        dls = VolumeDataLoaders.from_df(df, valid_col='valid', codes=codes, path=Path(a.learner).parent, device='cpu',
                **({'samples_per_case':a.samples, 'patch':(48,)*3} if a.samples else {}))
    learn = unet3d_learner(dls)
    ready = time.perf_counter()-t0
    print(dls.plan)
    t0 = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_for(a.minutes)
    r = dict(channels=learn.n_in, classes=learn.n_out, patch='×'.join(map(str, dls.plan.patch)), bs=dls.train.bs,
             ready_s=round(ready, 1), train_min=round((time.perf_counter()-t0)/60, 2),
             updates=len(learn.recorder.losses), loss=round(float(np.mean(learn.recorder.losses[-10:])), 3),
             train_peak_gb=round(peak()/1e9, 2))
    learn.export(Path(a.learner).name)
    print('\n'+json.dumps(r))

def score(a):
    from fastmed.all import load_learner
    learn = load_learner(a.learner)
    df = table(a.set)[0]
    df = df[df.valid]
    reset_peak()
    with quiet():
        t0 = time.perf_counter()
        m = learn.predict_volume(df.iloc[0].image)
        s = time.perf_counter()-t0
    most = peak()
    with quiet(): ev = learn.evaluate(df)
    print(ev.summary().round(4).to_string())
    su = ev.summary().loc['all']
    print('\n'+json.dumps(dict(scan='×'.join(map(str, m.shape)), predict_s=round(s, 1),
            predict_peak_gb=round(most/1e9, 2), cases=len(df), dice=round(float(su['mean']), 4), rows=len(ev),
            failed=int(su.failed))))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=1., help='of training, a set')
    p.add_argument('--sets', nargs='+', default=['ms_lesions','ixi_brains'], choices=['ms_lesions','ixi_brains'])
    p.add_argument('--samples', type=int, default=None, help='patches a case, of 48³: does the script run?')
    p.add_argument('--set', help=argparse.SUPPRESS)
    p.add_argument('--learner', help=argparse.SUPPRESS)
    p.add_argument('--score', action='store_true', help=argparse.SUPPRESS)
    p.add_argument('--out', default=here/'whole_scans.csv')
    a = p.parse_args()
    if a.set:
        (score if a.score else train)(a)
        sys.exit()
    rows = []
    for s in a.sets:
        with tempfile.TemporaryDirectory() as tmp:
            args = ['--set', s, '--learner', Path(tmp)/'export.pkl', '--minutes',
                    a.minutes] + (['--samples', a.samples] if a.samples else [])
            rows.append(dict(set=s, minutes=a.minutes, **child(__file__, *args), **child(__file__, *args, '--score')))
    keep(rows, a.out, ['set','minutes'])
