"""Do the intervals hold the truth, and do the tests keep what they promise? Studies drawn by the thousand from worlds
whose truth is known: coverage of the 95 % interval, type I error at 5 %, power at the `detectable` difference; before
(draws of subjects, signed ranks, 2.80 standard errors) and after.

    python benchmarks/coverage.py                 # 2,000 studies a cell, half an hour of one core; writes coverage.csv
    python benchmarks/coverage.py --what means twins --draws 200 --n 5 20 --out tried.csv

All studies of a cell are worked out at once; the first of them once more by the library, and both must agree.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from common import here
from scipy import stats

LEVEL = .95

# --- worlds: differences (draws, subjects, cases) whose true mean is 0
def clustered(rng, b, m): return .02*rng.normal(size=(b,m,1))+.01*rng.normal(size=(b,m,2))
def skewed(rng, b, m): return .02*(rng.exponential(size=(b,m,1))-1)+.01*rng.normal(size=(b,m,2))
def rare_failures(rng, b, m): return clustered(rng, b, m)-.5*(rng.random((b,m,2))<.03)+.015
def alike(rng, b, m): return np.repeat(.02*rng.normal(size=(b,m,1)), 2, 2)+1e-4*rng.normal(size=(b,m,2))
def unlike(rng, b, m): return .02*rng.normal(size=(b,m,2))
WORLDS = {'normal, ICC 0.8':clustered, 'normal, ICC 1':alike, 'normal, ICC 0':unlike, 'skewed':skewed,
          'rare failures, 3 %':rare_failures}

# --- all draws at once
def blocks(f, x, size=250):
    "`f` of blocks of columns, put together"
    return np.concatenate([f(x[:,i:i+size]) for i in range(0, x.shape[1], size)], -1)

def percentile(sums, n):
    "(2,draws) the middle of 10,000 draws of subjects, the same for all studies, as in `mean_interval`"
    from fastmed.metrics.stats import _group_counts
    w = _group_counts(np.random.default_rng(0), len(sums), 10_000, True).astype(float)
    return blocks(lambda s: np.quantile(w@s/n, [.025,.975], axis=0), sums)

def student(sums, n):
    "(2,draws) Student's t over subjects with as many cases each"
    se = sums.std(0, ddof=1)*np.sqrt(len(sums))/n
    half = stats.t.ppf(.975, len(sums)-1)*se
    return np.stack([sums.sum(0)/n-half, sums.sum(0)/n+half])

def flips(sums):
    "(draws,) p values of `flip_test`"
    from fastmed.metrics.paired import _patterns
    signs = np.concatenate(list(_patterns(len(sums), 0)))
    def p(s):
        far = np.abs(s.sum(0))-1e-12*np.abs(s).sum(0)
        return (np.abs(signs@s)>=far).mean(0)
    return blocks(p, sums)

def study(x, shift=0., few=50):
    "Intervals (2,draws) and p values (draws,), before and after, of differences (draws, subjects, cases)"
    sums,n = (x+shift).sum(2).T,x.shape[1]*x.shape[2]
    before = percentile(sums, n)
    after = student(sums, n) if len(sums)<few else before
    return before,stats.wilcoxon(sums, axis=0).pvalue,after,flips(sums)

def agrees(x, shift, k, interval, p):
    "The library says the same of draw `k`"
    from fastmed.metrics.paired import paired_comparison
    m,cases = x.shape[1:]
    r = paired_comparison((x[k]+shift).ravel(), np.zeros(m*cases), np.repeat([f'{i:03}' for i in range(m)], cases))
    np.testing.assert_allclose([r.low, r.high, r.p], [*interval[:,k], p[k]], rtol=1e-6, atol=1e-9)
    return r.detectable

def means(name, world, m, draws, seed):
    "Rows (before and after) of one cell"
    x = world(np.random.default_rng((seed,m)), draws, m)
    before,p_before,after,p_after = study(x)
    se = x.sum(2).std(1, ddof=1)/np.sqrt(m)/x.shape[2]
    unit = agrees(x, 0, 0, after, p_after)/se[0]                     # `detectable` in standard errors
    rows = []
    for how,(low,high),p,c in (('before',before,p_before,2.8016), ('after',after,p_after,unit)):
        shift = c*np.sqrt((se**2).mean())
        power = np.nan
        if np.isfinite(shift): power = (study(x, shift)[1 if how=='before' else 3]<.05).mean()
        rows.append(dict(world=name, subjects=m, method=how, coverage=((low<=0)&(0<=high)).mean(),
                         width=np.median(high-low), type_1=(p<.05).mean(), detectable=shift, power=power))
    return rows

# --- shares and areas, of the library itself
def shares(p, m, draws, seed):
    "Coverage for a share `p`, two cases a subject, ICC 0.5"
    from fastmed.metrics.stats import bootstrap_means, mean_interval, percentile_interval
    rng,groups,rows = np.random.default_rng((seed,m)),np.repeat(np.arange(m), 2),[]
    both = rng.random((draws,m,1))<.5                               # the second case repeats the first
    own = rng.random((draws,m,2))<p
    x = np.where(both, own[:,:,:1], own).reshape(draws, -1).astype(float)
    for how in ('before','after'):
        def ends(v):
            if how=='after': return mean_interval(v, groups)
            return percentile_interval(bootstrap_means(v, groups, 1000))
        hit = [(lo<=p+1e-12 and p-1e-12<=hi, hi-lo) for lo,hi in map(ends, x)]
        coverage,width = np.mean(hit, 0)
        rows.append(dict(world=f'share {p}', subjects=m, method=how, coverage=coverage, width=width))
    return rows

def areas(area, m, draws, seed):
    "Coverage for an area under the ROC curve, a third of the subjects ill"
    from fastmed.metrics.scores import auc_stat
    from fastmed.metrics.stats import area_interval, bootstrap, percentile_interval
    rng,y = np.random.default_rng((seed,m)),np.arange(m)<max(2, m//3)
    rows,x = [],rng.normal(size=(draws,m))+y*np.sqrt(2)*stats.norm.ppf(area)
    for how in ('before','after'):
        def ends(v):
            if how=='after': return area_interval(y, v)
            return percentile_interval(bootstrap(auc_stat(y, v), m, None, 500))
        hit = [(lo<=area<=hi, hi-lo) for lo,hi in map(ends, x)]
        coverage,width = np.mean(hit, 0)
        rows.append(dict(world=f'AUC {area}', subjects=m, method=how, coverage=coverage, width=width))
    return rows

# --- the same recipe twice, three seeds, five folds
def twins(m, sd, draws, seed, seeds=3, folds=5):
    "How often a difference is claimed between two arms of one recipe; `sd` of a training, as that of real ones"
    from fastmed.metrics.paired import _both_errors, _patterns, paired_comparison, training_luck
    from fastmed.metrics.stats import cluster_mean
    rng,fold,names = np.random.default_rng((seed,m)),np.arange(m)%folds,[f'{i:03}' for i in range(m)]
    trained = sd*(rng.normal(size=(draws,folds,seeds))-rng.normal(size=(draws,folds,seeds)))
    d = trained[:,fold]+.01*rng.normal(size=(draws,m,seeds))        # and a case by itself
    x,luck = d.mean(2).T,[training_luck(o, fold) for o in d]        # (m,draws)
    own = [cluster_mean(o, np.ones(m)) for o in x.T]
    both = np.array([_both_errors(o, k)[1:] for o,k in zip(own, luck, strict=True)])
    half = stats.t.isf(.025, both[:,1])*both[:,0]
    if m<50: low,high = x.mean(0)-half,x.mean(0)+half
    else:
        low,high = percentile(x, m)
        more = np.maximum(1, half/(stats.norm.isf(.025)*np.array([o.se for o in own])))
        more[[k.se==0 for k in luck]] = 1
        low,high = x.mean(0)-more*(x.mean(0)-low),x.mean(0)+more*(high-x.mean(0))
    signs,se = np.concatenate(list(_patterns(m, 0))),np.array([k.se for k in luck])
    error = np.random.default_rng(1).standard_t(luck[0].df, size=len(signs))
    def p(v):
        far = np.abs(v[:m].mean(0))
        return (1+(np.abs(signs@v[:m]/m+error[:,None]*v[m])>=far).sum(0))/(1+len(signs))
    with_luck = np.where(se>0, blocks(p, np.concatenate([x, se[None]])), 0)
    p_after = np.maximum(flips(x), with_luck)
    r = paired_comparison(x[:,0], np.zeros(m), names, luck=luck[0])
    np.testing.assert_allclose([r.low, r.high, r.p], [low[0], high[0], p_after[0]], rtol=1e-6, atol=1e-9)
    key = dict(world=f'twins, three seeds, sd of a training {sd}', subjects=m)
    before = (stats.wilcoxon(x, axis=0).pvalue<.05).mean()
    return [dict(key, method='before', type_1=before),
            dict(key, method='after', type_1=((p_after<.05)&(low*high>0)).mean(), coverage=((low<=0)&(0<=high)).mean())]

def parts(a):
    "Cells by name: functions that give their rows"
    for m in a.n:
        for name,world in WORLDS.items():
            yield 'means',lambda name=name, world=world, m=m: means(name, world, m, a.draws, a.seed)
    for m in a.n:
        for share in (.5,.9,.97): yield 'shares',lambda share=share, m=m: shares(share, m, a.draws, a.seed)
        for area in (.8,.95,.99): yield 'shares',lambda area=area, m=m: areas(area, m, a.draws, a.seed)
    for m in (30,100):
        for sd in (0.,.0025,.005,.01): yield 'twins',lambda sd=sd, m=m: twins(m, sd, a.draws, a.seed)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--draws', type=int, default=2000, help='studies of each cell')
    p.add_argument('--n', type=int, nargs='+', default=[5,10,20,50,100], help='numbers of subjects')
    p.add_argument('--what', nargs='+', default=['means','shares','twins'], help='the cells; rows of others stay')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=here/'coverage.csv')
    a = p.parse_args()
    kept = pd.read_csv(a.out) if a.out.exists() else pd.DataFrame()
    for what,cell in parts(a):
        if what not in a.what: continue
        new = pd.DataFrame(cell()).assign(draws=a.draws, part=what).round(4)
        if len(kept):
            again = kept.merge(new[['world','subjects','method']], indicator=True, how='left')._merge=='both'
            kept = kept[~again.to_numpy()]
        kept = pd.concat([kept, new], ignore_index=True)
        kept.to_csv(a.out, index=False)
        print(new.drop(columns=['draws','part']).to_string(index=False, header=False), flush=True)
