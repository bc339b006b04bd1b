"""Do the intervals hold the truth, and do the tests keep what they promise? Studies drawn by the thousand from worlds
whose truth is known: coverage of the 95 % interval, type I error at 5 %, power at the `detectable` difference; before
(draws of subjects, signed ranks, 2.80 standard errors) and after.

    python benchmarks/coverage.py                 # 2,000 studies a cell, 15 minutes of one core; writes coverage.csv
    python benchmarks/coverage.py --draws 200 --n 5 20 --out /tmp/coverage.csv

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
        shift = c*np.median(se)
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
    from fastmed.metrics.paired import paired_comparison, training_luck
    rng,fold,found = np.random.default_rng((seed,m)),np.arange(m)%folds,[]
    names = [f'{i:03}' for i in range(m)]
    for _ in range(draws):
        trained = sd*rng.normal(size=(folds,seeds))-sd*rng.normal(size=(folds,seeds))
        d = trained[fold]+.01*rng.normal(size=(m,seeds))            # and a case by itself
        claims = [stats.wilcoxon(d.mean(1)).pvalue<.05]
        r = paired_comparison(d.mean(1), np.zeros(m), names, luck=training_luck(d, fold))
        found.append([*claims, r.p<.05 and r.low*r.high>0, r.low<=0<=r.high])
    before,after,covered = np.mean(found, 0)
    key = dict(world=f'twins, three seeds, sd of a training {sd}', subjects=m)
    return [dict(key, method='before', type_1=before), dict(key, method='after', type_1=after, coverage=covered)]

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--draws', type=int, default=2000, help='studies of each cell')
    p.add_argument('--n', type=int, nargs='+', default=[5,10,20,50,100], help='numbers of subjects')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=here/'coverage.csv')
    a = p.parse_args()
    rows = []
    def keep(new):
        rows.extend(new)
        pd.DataFrame(rows).assign(draws=a.draws).round(4).to_csv(a.out, index=False)
        print(pd.DataFrame(new).round(3).to_string(header=len(rows)==2, index=False), flush=True)
    for m in a.n:
        for name,world in WORLDS.items(): keep(means(name, world, m, a.draws, a.seed))
    for m in a.n:
        for share in (.5,.9,.97): keep(shares(share, m, a.draws, a.seed))
        for area in (.8,.95,.99): keep(areas(area, m, a.draws, a.seed))
    for m in (30,100):
        for sd in (0.,.0025,.005,.01): keep(twins(m, sd, a.draws, a.seed))
