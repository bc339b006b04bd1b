"""Whose ten minutes were better? The per-case tables of `hippocampus.py` and `fastmonai_hippocampus.py --cases`, paired
by case, subjects drawn.

    python benchmarks/paired.py            # a second; reads hippocampus_cases.csv and hippocampus_fastmonai_cases.csv
"""
import itertools

import pandas as pd
from common import here

if __name__=='__main__':
    from fastmed.metrics.paired import paired_comparison
    own = pd.read_csv(here/'hippocampus_cases.csv')
    own = own[own.fold==0]
    tables = {m:t for m,t in own.groupby('model')}
    if (f:=here/'hippocampus_fastmonai_cases.csv').exists(): tables['fastMONAI, tutorial recipe'] = pd.read_csv(f)
    wide = {m:t.pivot(index='case', columns='structure', values='dice').assign(both=lambda d: d.mean(axis=1)) for m,
                      t in tables.items()}
    subjects = pd.read_csv(here/'hippocampus_folds.csv', dtype={'subject':str}).set_index('case').subject
    res = {}
    for a,b in itertools.combinations(wide, 2):
        i = wide[a].index.intersection(wide[b].index)
        t = paired_comparison(wide[a].loc[i], wide[b].loc[i], subjects.loc[i])
        res[f'{a} - {b}'] = t[['mean','low','high','p','p_holm','p_wilcoxon','win','loss','n','subjects','detectable']]
    t = pd.concat(res, names=['pair'])
    print(t.round(4).to_string())
    t.round(5).to_csv(here/'hippocampus_paired.csv')
