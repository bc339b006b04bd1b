"""Slices or volumes, on the hippocampus: 3D, 2D and 2.5D on five subject-grouped folds with equal minutes, and the same
models on thicker slices.

    # about 45 minutes on two cores; stopped and started again, it goes on
    FASTMED_DATA=… python benchmarks/slices_or_volumes.py --minutes 2 --path comparison

Writes `slices_or_volumes_summary.csv`, `_paired.csv`, `_cost.csv`, `_remedies.csv`, `_shift.csv` here, and
`report.html` into the folder of the runs.
"""
import argparse
from pathlib import Path

from common import here, machine

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=2., help='of each of the 15 trainings')
    p.add_argument('--path', type=Path, default=Path('comparison'), help='folder of the runs')
    p.add_argument('--no-shift', dest='shift', action='store_false', help='leave the thicker slices out')
    p.add_argument('--seeds', type=int, default=1)
    a = p.parse_args()
    import pandas as pd

    from fastmed.all import Comparison, URLs, scan_decathlon, untar_data
    comp = Comparison(scan_decathlon(untar_data(URLs.HIPPOCAMPUS)),
            {'3D':dict(ndim=3), '2D':dict(ndim=2), '2.5D':dict(ndim=2, context=2)},
            codes=['background','anterior','posterior'],
                      folds=5, seeds=a.seeds, budget=dict(minutes=a.minutes), path=a.path).run()
    tables = dict(summary=comp.summary(), paired=comp.paired(equal_within=.005), remedies=comp.remedies(),
            cost=comp.cost.groupby('arm', sort=False).mean(numeric_only=True).drop(columns=['fold','seed']))
    if a.shift:
        shifts = {ax:comp.shift(axis=ax) for ax in (0,1)}
        tables['shift'] = pd.concat({ax:s.summary() for ax,s in shifts.items()}, names=['thick_axis'])
    for k,t in tables.items():
        print(t.drop(columns='rule', errors='ignore').round(4).to_string(), '\n', flush=True)
        t.drop(columns='rule', errors='ignore').round(5).assign(minutes=a.minutes,
                machine=machine()).to_csv(here/f'slices_or_volumes_{k}.csv')
    print(comp.answer(), comp.best().sentence)
    print(comp.report(a.path/'report.html', shift=shifts[0] if a.shift else None), 'written')
