"""Many small scans in one folder and few files open: seconds and peak memory of a check, of an epoch and of a
prediction.

    python benchmarks/many.py                  # 1,000 cases, 256 files at a time
    python benchmarks/many.py --cases 60 --files 96
    # the comparison of find_leaks alone, of drawn prints without files
    python benchmarks/many.py --prints 4000
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

size = 24

def write(path, n):
    "`n` scans of 24³ voxels with one structure, in images/ and labels/"
    rng = np.random.default_rng(0)
    grid = np.indices((size,)*3)
    for k in ('images','labels'): (path/k).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        middle,r = rng.uniform(9, 15, 3),rng.uniform(4, 7)
        mask = (((grid-middle[:,None,None,None])**2).sum(0)<r*r).astype(np.uint8)
        scan = (rng.normal(100, 12, mask.shape)+60*mask).astype(np.float32)
        for k,a in (('images',scan), ('labels',mask)):
            nib.save(nib.Nifti1Image(a, np.eye(4)), path/k/f'case{i:04d}.nii.gz')

def prints(n):
    "What `find_leaks` keeps of `n` scans that have nothing to do with each other"
    rng,res = np.random.default_rng(0),[]
    for i in range(n):
        gaps = rng.random(300)<.2
        gaps[[0,-1]] = False
        p = dict(sketch=rng.integers(0, 2**63, 512, dtype=np.uint64), quantum=np.nan,
                 gaps=(int(rng.integers(0, 40)),300,np.packbits(gaps)) if i%2 else None,
                 thumb=rng.standard_normal((20,)*3).astype(np.float16), like=rng.standard_normal(49).astype(np.float32))
        res.append(dict(channels=[], prints=[p]))
    return res

def compare(n):
    "The row of `n` prints"
    from fastmed.data import leaks
    vox,rows = prints(n),[]
    timed('find_leaks, prints known', lambda: leaks._pairs(vox), rows)
    return [dict(r, cases=n) for r in rows]

def timed(what, f, rows):
    "Add seconds and peak memory of `f()` to `rows`, and give what it gave"
    common.reset_peak()
    was,t,c = common.rss(),time.perf_counter(),time.process_time()
    res = f()
    rows.append(dict(what=what, seconds=round(time.perf_counter()-t, 1), cpu_s=round(time.process_time()-c, 1),
                     peak_mb=round(common.peak()/1e6), more_mb=round((common.peak()-was)/1e6)))
    print(rows[-1], file=sys.stderr, flush=True)
    return res

def run(path, n, files, workers):
    "The rows of the table; raises where a case is lost on the way"
    import resource
    path = Path(path)
    write(path, n)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    from fastmed.all import VolumeDataLoaders, check_dataset, scan_folder, unet3d_learner
    rows,df = [],scan_folder(path)
    def check(): return check_dataset(df, ['background','ball'], cache=path/'cache')
    report = timed('check_dataset, first', check, rows)
    if timed('check_dataset, again', check, rows).to_dict('records')!=report.to_dict('records'):
        raise SystemExit('the second check found something else')
    if len(report.errors): raise SystemExit(f'the check found errors: {report.errors.iloc[0].to_dict()}')
    def loaders():
        return VolumeDataLoaders.from_df(df, path=path, codes=['background','ball'], patch=16, bs=8, samples_per_case=1,
                                         spacing=None, cache=path/'cache', num_workers=workers, device='cpu')
    timed('from_df, first', loaders, rows)
    dls = timed('from_df, again', loaders, rows)
    learn = unet3d_learner(dls, nf=4, depth=2)
    timed('an epoch of training', lambda: learn.fit(1), rows)
    done = timed('predict_folder', lambda: learn.predict_folder(path/'images', path/'out'), rows)
    if len(done)!=n or (done.status!='ok').any():
        raise SystemExit(f"not predicted: {done[done.status!='ok'].iloc[0].to_dict()}")
    return [dict(r, cases=n, files=files, workers=workers) for r in rows]

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--cases', type=int, default=1000)
    p.add_argument('--files', type=int, default=256, help='files that the process may have open')
    p.add_argument('--workers', type=int, default=0, help='of the DataLoaders')
    p.add_argument('--prints', type=int, help='compare so many prints, and nothing else')
    p.add_argument('--csv', default=str(common.here/'many.csv'))
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp, common.quiet():
        rows = compare(a.prints) if a.prints else run(tmp, a.cases, a.files, a.workers)
    common.keep(rows, a.csv, ['what','cases','files','workers'])

if __name__=='__main__': main()
