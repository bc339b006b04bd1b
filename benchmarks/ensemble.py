"""Five fold models of the hippocampus against their ensemble, on subjects that none of them has seen; whether their
disagreement finds the worst cases; and what the ensemble costs in memory.

    # about 20 minutes on two cores; stopped and started again, it goes on
    FASTMED_DATA=… python benchmarks/ensemble.py --path ensemble_runs

One of the five folds of `hippocampus_folds.csv` is the test set. The other subjects are split in five by
`cross_validate`, which trains a 3D model on each four fifths of them. All five, and their ensemble, then predict the
test set.
Writes `ensemble.csv` (scores and differences), `ensemble_worst.csv` (uncertainty against Dice), `ensemble_cases.csv` (a
row a test case and structure), `ensemble_memory.csv` (a row a fresh process).
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from common import child, here, keep, peak, quiet, reset_peak, rss

CODES = ['background','anterior','posterior']

def cases(test):
    "The cases, with `test` marked"
    from fastmed.all import URLs, scan_decathlon, untar_data
    df = scan_decathlon(untar_data(URLs.HIPPOCAMPUS))
    folds = pd.read_csv(here/'hippocampus_folds.csv', dtype={'subject':str})
    df = df.merge(folds[['case','fold']], on='case')
    df['test'] = df.pop('fold')==test
    return df

def of_case(ev):
    "Mean Dice of the structures of each case, failures 0"
    return ev.assign(dice=ev.dice.mask(ev.status.isin(['missed','false positive']), 0.)).groupby('case').dice.mean()

def scores(a):
    from fastmed.all import TTA, cross_validate, mean_interval, paired_comparison
    df = cases(a.test)
    rest,test = [df[df.test==t].drop(columns='test').reset_index(drop=True) for t in (False,True)]
    cv = cross_validate(rest, folds=5, ndim=3, codes=CODES, budget=dict(updates=a.updates), path=a.path/'folds',
                        masks=False)
    print(cv.answer(), '\n')
    ens = cv.ensemble()
    assert not ens.saw(test), ens.saw(test)
    sub = test.set_index('case').subject.astype(str)
    per,rows = {},[]
    evs = {f'fold {i}':l.evaluate(test) for i,l in enumerate(ens)}
    evs['ensemble'] = ens.evaluate(test, uncertainty=True)
    evs['fold 0, looks'] = ens[0].evaluate(test, tta=TTA((), rotate=10, scale=.1))
    evs['ensemble, looks'] = ens.evaluate(test, tta=TTA((), rotate=10, scale=.1))
    for k,e in evs.items():
        v = per[k] = of_case(pd.DataFrame(e))
        lo,hi = mean_interval(v.values, sub[v.index].values)
        s = e.summary()
        rows.append(dict(what=k, dice=v.mean(), low=lo, high=hi, anterior=s.loc['anterior','mean'],
                posterior=s.loc['posterior','mean'], hd95=e.summary('hd95').loc['all','mean'], worst=v.min(),
                cases=len(v), subjects=sub[v.index].nunique()))
    members = [k for k in per if k.startswith('fold') and 'looks' not in k]
    pd_ = pd.DataFrame(per)
    # by its own held-out cases, not by the test set
    oof = cv.splits()
    best = members[int(np.argmax(oof.values))]
    for name,x,y in (('ensemble − mean of the members', pd_.ensemble, pd_[members].mean(axis=1)),
            (f'ensemble − {best}, the best out of fold', pd_.ensemble, pd_[best]),
            *((f'ensemble − {m}', pd_.ensemble, pd_[m]) for m in members),
                     ('fold 0: looks − none', pd_['fold 0, looks'], pd_['fold 0']),
            ('ensemble: looks − none', pd_['ensemble, looks'], pd_.ensemble)):
        r = paired_comparison(x, y, sub[pd_.index].values)
        rows.append(dict(what=name, dice=r.mean, low=r.low, high=r.high, p=r.p, win=r.win, loss=r.loss, cases=r.n,
                         subjects=r.subjects))
    keep([{k:round(v, 5) if isinstance(v, float) else v for k,v in r.items()} | dict(updates=a.updates, test=a.test)
            for r in rows], here/'ensemble.csv', ['what','updates','test'])
    e = evs['ensemble']
    t = e.finds_worst()
    keep([dict(measure=k, **{c:round(float(v), 4) for c,v in r.items()}, updates=a.updates, test=a.test) for k,
            r in t.iterrows()], here/'ensemble_worst.csv', ['measure','updates','test'])
    pd.DataFrame(e).drop(columns='subject').round(5).to_csv(here/'ensemble_cases.csv', index=False)

def predict(a):
    "What a fresh process does: open, predict, and say the most that it held"
    import torch

    from fastmed.all import Ensemble, TensorVolume, load_model, load_volume
    files = sorted(a.learners.glob('*.safetensors'))
    before = rss()
    l = load_model(files[0], 'cpu') if a.what=='one' else Ensemble(files, lazy=a.what=='lazy', device='cpu')
    x = load_volume(cases(a.test).image[0]) if a.scan=='hippocampus' else TensorVolume(torch.randn(1, *(int(a.scan),)*3,
            generator=torch.Generator().manual_seed(0)), affine=np.eye(4))
    l_bytes = sum(f.stat().st_size for f in files)
    loaded = rss()
    reset_peak()
    with quiet(): l.predict_volume(x)
    print('\n'+json.dumps(dict(before=before, loaded=loaded, peak=peak(), weights=l_bytes)))

def memory(a):
    "One member, all five, and all five read one by one, each in fresh processes"
    from fastmed.all import save_model
    from fastmed.study.arms import load_run
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for i in range(5): save_model(load_run(a.path/'folds'/f'repeat 0, fold {i}'), Path(tmp)/f'{i}.safetensors')
        for scan in ('hippocampus', str(a.size)):
            for what in ('one','five','lazy'):
                rs = [child(__file__, '--what', what, '--learners', tmp, '--scan', scan, '--test', a.test)
                            for _ in range(a.repeats)]
                p = min(r['peak'] for r in rs)
                rows.append(dict(scan=scan if scan=='hippocampus' else f'{scan}³', members=what,
                        peak_mb=round(p/1e6, 1), highest_mb=round(max(r['peak'] for r in rs)/1e6, 1),
                        weights_mb=round(rs[0]['weights']/1e6, 1), runs=len(rs)))
            one,five,lazy = [r['peak_mb'] for r in rows[-3:]]
            w = rows[-1]['weights_mb']
            for r,x in zip(rows[-3:], (one,five,lazy)): r.update(above_one_mb=round(x-one, 1), held=bool(x<=one+w))
    keep(rows, here/'ensemble_memory.csv', ['scan','members'])
    if not all(r['held'] for r in rows): sys.exit('an ensemble held more than one member and the weights')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--updates', type=int, default=200, help='of each of the five trainings')
    p.add_argument('--path', type=Path, default=Path('ensemble_runs'), help='folder of the runs')
    p.add_argument('--test', type=int, default=0, help='the fold of hippocampus_folds.csv that is the test set')
    p.add_argument('--size', type=int, default=200, help='side of the large scan for memory')
    p.add_argument('--repeats', type=int, default=3, help='fresh processes of each kind')
    p.add_argument('--only', choices=['scores','memory'], help='one half alone')
    p.add_argument('--what', help=argparse.SUPPRESS)
    p.add_argument('--learners', type=Path, help=argparse.SUPPRESS)
    p.add_argument('--scan', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.what:
        predict(a)
        sys.exit()
    if a.only!='memory': scores(a)
    if a.only!='scores': memory(a)
