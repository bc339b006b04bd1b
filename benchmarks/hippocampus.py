"""Ten minutes of training on the hippocampus with fastmed's defaults, scored by the exported Learner in a fresh
process.

    FASTMED_DATA=… python benchmarks/hippocampus.py --ndim 3 --minutes 10
    FASTMED_DATA=… python benchmarks/hippocampus.py --ndim 3 --minutes 1 --device cuda
"""
import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from common import keep

here = Path(__file__).parent

def cases(fold=0):
    "The 208 cases with their fold; one fold is held out"
    from fastmed.all import URLs, scan_decathlon, untar_data
    df = scan_decathlon(untar_data(URLs.HIPPOCAMPUS))
    folds = pd.read_csv(here/'hippocampus_folds.csv', dtype={'subject':str})
    return df.merge(folds[['case','fold']], on='case').assign(valid=lambda d: d.fold==fold)

def train(ndim, minutes, fold, out, device):
    from fastmed.all import SliceDataLoaders, VolumeDataLoaders, set_seed, unet2d_learner, unet3d_learner
    set_seed(42)
    df = cases(fold)
    df.attrs['codes'] = ['background','anterior','posterior']
    dls = (VolumeDataLoaders if ndim==3 else SliceDataLoaders).from_df(df, valid_col='valid', path=out.parent,
            device=device)
    learn = (unet3d_learner if ndim==3 else unet2d_learner)(dls)
    t0 = time.perf_counter()
    learn.fit_for(minutes)
    (out.parent/'updates').write_text(str(len(learn.recorder.losses)))
    print(f'fit_for({minutes:g}) took {(time.perf_counter()-t0)/60:.2f} min, {len(learn.recorder.values)} epochs, '
          f'{len(learn.recorder.losses)} updates', flush=True)
    learn.export(out.name)

def score(ndim, minutes, fold, out, device):
    from fastmed.all import load_learner
    learn = load_learner(out, cpu=device=='cpu')
    name = f'fastmed {ndim}D, defaults'+(', GPU' if device!='cpu' else '')
    df = cases(fold)
    df = df[df.valid]
    t0 = time.perf_counter()
    ev = learn.evaluate(df)
    s = (time.perf_counter()-t0)/len(df)
    cases_fn = here/'hippocampus_cases.csv'
    mine = pd.DataFrame(ev)[['case','structure','dice','hd95','nsd']].round(4).assign(model=name, minutes=minutes,
                             fold=fold)
    old = pd.read_csv(cases_fn) if cases_fn.exists() else mine[:0]
    pd.concat([old[~((old.model==mine.model[0]) & (old.minutes==minutes) & (old.fold==fold))], mine]).to_csv(cases_fn,
            index=False)
    table = ev.summary()
    print(table.round(4).to_string())
    row = dict(model=name, minutes=minutes, fold=fold, updates=int((out.parent/'updates').read_text()), cases=len(df),
            **{k:round(float(table.loc[k,'mean']), 4) for k in table.index}, seconds_a_case=round(s, 2))
    keep([row], here/'hippocampus.csv', ['model','minutes','fold'], device)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--ndim', type=int, default=3)
    p.add_argument('--minutes', type=float, default=10.)
    p.add_argument('--fold', type=int, default=0, help='held out')
    p.add_argument('--out', type=Path, default=None)
    p.add_argument('--score', action='store_true')
    p.add_argument('--device', default='cpu')
    a = p.parse_args()
    out = a.out or Path(tempfile.mkdtemp())/'export.pkl'
    out.parent.mkdir(parents=True, exist_ok=True)
    if a.score: score(a.ndim, a.minutes, a.fold, out, a.device)
    else:
        train(a.ndim, a.minutes, a.fold, out, a.device)
        subprocess.run([sys.executable, __file__, '--score', '--ndim', str(a.ndim), '--minutes', str(a.minutes),
                        '--fold', str(a.fold), '--device', a.device, '--out', str(out)], check=True)
