"""SIGKILL at random instants, and a second start: what is corrupt, changed, done twice or left behind. Also several
processes at one piece of work.

Each job runs in a child that is forked from this process, which has imported fastmed once and has no threads. Half of
the instants are spread over the time that the job takes, the other half are moments
of writing: the child kills itself just before its n-th opening, renaming or removing of a file, or a few milliseconds
after. Then the job is started again and runs to its end.

    python benchmarks/kills.py                       # all jobs, 20 kills each, a few minutes
    python benchmarks/kills.py --jobs store --kills 2 --out /tmp/kills.csv
"""
import argparse
import contextlib
import hashlib
import http.server
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
import nibabel as nib
import numpy as np
import pandas as pd
import torch

from fastmed.all import *
from fastmed.core import whole_file
from fastmed.learn.fingerprint import read_state
from fastmed.study.arms import load_run

torch.set_num_threads(1)

CODES = ['background','large','small']

# --- children

def fork(f, *args, log=os.devnull):
    "Run `f(*args)` in a child that shares what was imported; gives its process id"
    if pid:=os.fork(): return pid
    code = 1
    try:
        fd = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
        f(*args)
        code = 0
    except BaseException: traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def watch(path, stop=None, after=0., tell=None):
    "Count what changes files below `path`; at number `stop` kill this process, at once or `after` seconds"
    n,names = [0],('os.rename','os.remove','os.mkdir','os.rmdir','os.truncate')
    def hook(event, args):
        if event=='open': hit = isinstance(args[2], int) and args[2]&(os.O_WRONLY|os.O_RDWR|os.O_CREAT)
        else: hit = event in names
        if not hit or not isinstance(args[0],
                                     (str,bytes,os.PathLike)) or not os.path.abspath(os.fsdecode(args[0])).startswith(
                str(path)+os.sep):
            return
        n[0] += 1
        if tell: os.pwrite(tell, f'{n[0]:8d}'.encode(), 0)
        if n[0]==stop:
            if not after: os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    sys.addaudithook(hook)

def watched(job, path, stop, after, tell=None):
    watch(path, stop, after, tell)
    job.work(path)

# --- what the jobs have in common

def digest(o):
    if isinstance(o, torch.Tensor): o = o.detach().cpu().numpy()
    if isinstance(o, np.ndarray): o = o.tobytes()+str((o.dtype,o.shape)).encode()
    return hashlib.sha256(o if isinstance(o, bytes) else str(o).encode()).hexdigest()[:16]
def stamp(p):
    s = p.stat()
    return s.st_ino,s.st_mtime_ns
def hidden(path):
    return sorted(str(o.relative_to(path)) for o in path.rglob('*') if o.name.startswith('.part')
                  or o.name.endswith(('.part','.old')) or o.name=='unfinished')

def phantoms(path, n, shape):
    rows = []
    for i in range(n):
        for im,sub in zip(phantom(shape, seed=i), ('images','labels')):
            (path/sub).mkdir(parents=True, exist_ok=True)
            nib.save(im, path/sub/f'c{i}.nii.gz')
        rows.append(dict(case=f'c{i}', subject=f's{i}', image=str(path/f'images/c{i}.nii.gz'),
                mask=str(path/f'labels/c{i}.nii.gz')))
    return pd.DataFrame(rows)

def dataloaders(df, cache, seed=3):
    set_seed(seed, reproducible=True)
    return VolumeDataLoaders.from_df(df, codes=CODES, patch=16, bs=2, samples_per_case=2, num_workers=0, device='cpu',
                                     cache=cache, seed=seed)

class Job:
    """Work in a folder. `whole` reads every finished product and gives its stamp; `result` is what a run that was never
    killed must give too"""
    def __init__(self, base): self.base = base
    def left(self, path): return hidden(path)
    def done(self, path): return 0                     # parts of the work that are kept inside of one file
    def repeated(self, path, before, done):
        return sum(p not in (now:=self.whole(path)) or now[p]!=s for p,s in before.items())

class BuildStore(Job):
    "A store of 24 images and masks, by two threads"
    name = 'store'
    def __init__(self, base):
        super().__init__(base)
        self.df = phantoms(base/'data', 24, (40,40,40))
    def _store(self, path): return Store(Preprocess(spacing=.8, codes=CODES), path)
    def work(self, path): self._store(path).build(self.df.image.tolist(), self.df['mask'].tolist(), workers=2)
    def whole(self, path):
        res = {}
        for d in [o for k in ('image','mask') for o in (path/k).glob('*') if not o.name.startswith('.')]:
            a = np.load(d/'data.npy')
            assert a.shape[-3:]==(50,50,50) and np.isfinite(a).all()
            json.loads((d/'meta.json').read_text())
            if d.parent.name=='mask': dict(np.load(d/'fg.npz'))
            res[d] = stamp(d/'data.npy')
        return res
    def result(self, path):
        return {str(f.relative_to(path)):digest(f.read_bytes()) for f in sorted(path.rglob('*')) if f.is_file()
                and not f.name.startswith('.') and f.suffix!='.npz' and f.parent.name!='facts'} | \
                                   {str(f.relative_to(path)):{k:digest(v) for k,v in np.load(f).items()}
                for f in sorted(path.rglob('*.npz'))}

class Slow(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_GET(self):
        b = (Path(self.directory)/'set.tar.gz').read_bytes()
        self.send_response(200)
        self.send_header('Content-Length', str(len(b)))
        self.end_headers()
        with contextlib.suppress(OSError):
            for i in range(0, len(b), 2**15):
                self.wfile.write(b[i:i+2**15])
                self.wfile.flush()
                time.sleep(.01)

class Download(Job):
    "An archive of 30 files from a slow server, verified and unpacked"
    name = 'download'
    def __init__(self, base):
        super().__init__(base)
        rng = np.random.default_rng(0)
        with tarfile.open(base/'set.tar.gz', 'w:gz', compresslevel=1) as t:
            for i in range(30):
                o = tarfile.TarInfo(f'set/imagesTr/{i}.nii')
                o.size = 60_000
                t.addfile(o, io.BytesIO(rng.bytes(60_000)))
        self.sum = hashlib.sha256((base/'set.tar.gz').read_bytes()).hexdigest()
        srv = http.server.ThreadingHTTPServer(('127.0.0.1', 0), lambda *a: Slow(*a, directory=str(base)))
        self.url = f'http://127.0.0.1:{srv.server_port}/set.tar.gz'
        self.server = fork(srv.serve_forever)
        srv.server_close()
    def work(self, path): untar_data(self.url, base=path, checksum=self.sum)
    def whole(self, path):
        res = {}
        if (a:=path/'archive/set.tar.gz').exists():
            assert hashlib.sha256(a.read_bytes()).hexdigest()==self.sum
            res[a] = stamp(a)
        if (d:=path/'data/set').exists():
            fs = sorted(d.rglob('*.nii'))
            assert len(fs)==30 and all(f.stat().st_size==60_000 for f in fs)
            res.update({f:stamp(f) for f in fs})
        return res
    def result(self, path):
        return {str(f.relative_to(path)):digest(f.read_bytes()) for f in sorted((path/'data').rglob('*'))
                if f.is_file()}

class Count(Callback):
    order = 64
    def __init__(self, fn): self.fn = fn
    def after_batch(self):
        if self.training and not self.learn.resume.skip:
            with open(self.fn, 'ab') as f: f.write(b'.')

class Train(Job):
    "Three epochs of four batches with ResumeCallback(every=1, keep=True), then the weights"
    name = 'training'
    def __init__(self, base):
        super().__init__(base)
        self.df = phantoms(base/'data', 5, (20,20,20))
        ended(fork(dataloaders, self.df, base/'cache'))
    def _steps(self, path): return path.with_name(path.name+'.steps')
    def work(self, path):
        if (path/'weights.pth').exists(): return
        learn = unet3d_learner(dataloaders(self.df, self.base/'cache'), nf=4, depth=2, path=path, fast=False)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(3, 1e-2, cbs=[ResumeCallback('r.pth', 1, keep=True), Count(self._steps(path))])
        with whole_file(path/'weights.pth') as tmp:
            torch.save(dict(model=learn.model.state_dict(), losses=[float(o) for o in learn.recorder.losses],
                            values=[list(map(float, o)) for o in learn.recorder.values]), tmp)
        (path/'r.pth').unlink()
    def whole(self, path):
        for f in path.glob('[!.]*.pth'): read_state(f) if f.name=='r.pth' else torch.load(f, weights_only=True)
        return {f:stamp(f) for f in path.glob('weights.pth')}
    def done(self, path):
        if (path/'weights.pth').exists(): return 12
        if not (path/'r.pth').exists(): return 0
        s = read_state(path/'r.pth')
        return s['epoch']*4+s['batch']
    def repeated(self, path, before, done):
        fn = self._steps(path)
        return super().repeated(path, before, done)+(fn.stat().st_size if fn.exists() else 0)-(12-done)
    def result(self, path):
        s = torch.load(path/'weights.pth', weights_only=True)
        return {k:digest(v) for k,v in s['model'].items()} | dict(losses=s['losses'],
                values=digest([o[:-1] for o in s['values']]), state=(path/'r.pth').exists())

class Predict(Job):
    "Masks of eight scans by predict_folder"
    name = 'predict_folder'
    def __init__(self, base):
        super().__init__(base)
        self.df = phantoms(base/'data', 8, (36,36,36))
        def make():
            set_seed(0)
            unet3d_learner(dataloaders(self.df, base/'cache'), nf=4, depth=2, path=base, fast=False).export('m.pkl')
        assert ended(fork(make, log=base/'log'))==0, (base/'log').read_text()
    def work(self, path):
        learn = load_learner(self.base/'m.pkl')
        with learn.no_bar(): assert (learn.predict_folder(self.base/'data/images', path).status=='ok').all()
    def whole(self, path):
        for f in path.glob('[!.]*.nii.gz'): load_mask(f)
        return {f:stamp(f) for f in path.glob('[!.]*.nii.gz')}
    def result(self, path): return {f.name:digest(f.read_bytes()) for f in sorted(path.glob('[!.]*.nii.gz'))}

class Compare(Job):
    "Two arms on two folds, three updates each, trained and scored"
    name = 'comparison'
    def __init__(self, base):
        super().__init__(base)
        self.df = phantoms(base/'data', 4, (18,18,18))
        ended(fork(self._of(base/'warm').check))
    def _of(self, path):
        return Comparison(self.df, {'3D':dict(ndim=3), '2D':dict(ndim=2, patch=(16,16,1), axis=2)}, codes=CODES,
                          folds=2, budget=dict(updates=3), nf=4, depth=2, bs=2, samples_per_case=2, patch=16,
                          device='cpu', num_workers=0, path=path/'c', cache=self.base/'cache')
    def work(self, path): self._of(path).run()
    def whole(self, path):
        res = {}
        for d in (path/'c').glob('*, fold*'):
            for n in ('results','slices','remedied','log'): assert len(pd.read_csv(d/f'{n}.csv'))
            json.loads((d/'run.json').read_text())
            res[d] = stamp(d/'results.csv')+stamp(d/'model.safetensors')
        return res
    def result(self, path):
        res = {f'{d.name}/{n}':digest((d/f'{n}.csv').read_bytes()) for d in sorted((path/'c').glob('*, fold*'))
                for n in ('results','slices','remedied','log')}
        for d in sorted((path/'c').glob('*, fold*')):
            res[d.name] = {k:digest(v) for k,v in load_run(d).model.state_dict().items()}
        return res

JOBS = (BuildStore, Download, Train, Predict, Compare)

# --- the measurements

class Kills:
    "One job, killed and started again in folders below `work`; `row` counts what came of it"
    def __init__(self, job, work):
        self.job,self.work,self.log = job,work,work/'log'
        self.tell = os.open(work/'tell', os.O_RDWR|os.O_CREAT|os.O_TRUNC)
        ref = self.folder('never')
        t0 = time.perf_counter()
        pid = fork(watched, job, ref, None, 0., self.tell, log=self.log)
        assert ended(pid)==0, self.log.read_text()[-3000:]
        self.took,self.events,self.want = time.perf_counter()-t0,int(os.pread(self.tell, 8, 0)),job.result(ref)
        again = job.whole(ref)
        assert ended(fork(job.work, ref, log=self.log))==0, self.log.read_text()[-3000:]
        assert job.whole(ref)==again and job.left(ref)==[], 'a start after the end changed something'
        self.row = dict(job=job.name, kills=0, while_writing=0, corrupted=0, changed=0, done_twice=0, left_behind=0,
                        parts=len(again) or 1, writes=self.events, seconds=round(self.took, 2))

    def folder(self, k):
        p = self.work/f'{self.job.name}-{k}'
        p.mkdir(parents=True)
        return p

    def kill(self, path, share, writing, rng):
        "Start the job and kill it after this share of its time or of its writes; how it ended"
        if writing:
            wait = rng.choice([0.,0.,rng.uniform(0, .004)])
            event = max(1, math.ceil(share*self.events))
            return ended(fork(watched, self.job, path, event, wait, self.tell, log=self.log))
        pid,t0 = fork(self.job.work, path, log=self.log),time.perf_counter()
        def running(): return os.waitid(os.P_PID, pid, os.WEXITED|os.WNOWAIT|os.WNOHANG) is None
        while (over:=time.perf_counter()-t0)<share*self.took and running():
            time.sleep(min(.005, share*self.took-over))
        if over<share*self.took: self.took = over        # quicker than the first time: the instants move up
        with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        return ended(pid)

    def start_again(self, path, when):
        "Run what was killed to its end, and count what is wrong"
        job,row = self.job,self.row
        try:
            before,done = job.whole(path),job.done(path)
            if isinstance(job, Train): job._steps(path).unlink(missing_ok=True)
            code = ended(fork(job.work, path, log=self.log))
            assert code==0, self.log.read_text()[-3000:]
            job.whole(path)
            got = job.result(path)
        except Exception:
            row['corrupted'] += 1
            traceback.print_exc()
            return
        row['changed'] += got!=self.want
        row['done_twice'] += max(0, job.repeated(path, before, done))
        row['left_behind'] += len(job.left(path))
        if got!=self.want or job.left(path):
            print(job.name, when, [k for k in self.want if got.get(k)!=self.want[k]], job.left(path), file=sys.stderr)

def kills(job, work, n, seed):
    "Kill and start again, `n` times: one row"
    rng,it,tries = random.Random(f'{seed} {job.name}'),Kills(job, work),0
    while it.row['kills']<n and tries<5*n:
        k,tries = it.row['kills'],tries+1
        path,writing = it.folder(tries),k%2==1
        share = (k//2+rng.random())/math.ceil(n/2)       # one instant in each stretch of the work
        if it.kill(path, share, writing, rng)==-signal.SIGKILL:
            it.row['kills'] += 1
            it.row['while_writing'] += writing
            it.start_again(path, f'kill {k} '+('writing' if writing else f'{share*it.took:.2f} s'))
        shutil.rmtree(path)
    os.close(it.tell)
    return it.row

def together(job, work, n):
    "`n` processes at the same work at once: one row"
    ref,path,log = work/f'{job.name}-one',work/f'{job.name}-many',work/'log'
    ref.mkdir()
    path.mkdir()
    assert ended(fork(job.work, ref, log=log))==0, log.read_text()[-3000:]
    codes = [ended(p) for p in [fork(job.work, path, log=log) for _ in range(n)]]
    if any(codes): print(log.read_text()[-3000:], file=sys.stderr)
    try:
        job.whole(path)
        got = job.result(path)
        bad = 0
    except Exception:
        traceback.print_exc()
        got,bad = None,1
    row = dict(job=job.name, processes=n, failed=sum(c!=0 for c in codes), corrupted=bad,
               changed=int(got!=job.result(ref)), left_behind=len(job.left(path)))
    shutil.rmtree(ref)
    shutil.rmtree(path)
    return row

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--jobs', default=','.join(j.name for j in JOBS), help='which, by commas')
    p.add_argument('--kills', type=int, default=20)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--together', default='2,4', help='numbers of processes at one piece of work; empty for none')
    p.add_argument('--together-jobs', default='store,comparison')
    p.add_argument('--out', default=here/'kills.csv', type=Path)
    a = p.parse_args()
    rows,many = [],[]
    with tempfile.TemporaryDirectory() as tmp:
        for J in JOBS:
            if J.name not in a.jobs.split(',')+a.together_jobs.split(','): continue
            (base:=Path(tmp)/J.name).mkdir()
            job = J(base)
            try:
                if a.kills and J.name in a.jobs.split(','):
                    rows.append(kills(job, base, a.kills, a.seed))
                    print(json.dumps(rows[-1]), flush=True)
                if J.name in a.together_jobs.split(','):
                    for n in [int(o) for o in a.together.split(',') if o]:
                        many.append(together(job, base, n))
                        print(json.dumps(many[-1]), flush=True)
            finally:
                if hasattr(job, 'server'):
                    os.kill(job.server, signal.SIGKILL)
                    os.waitpid(job.server, 0)
    if rows:
        pd.DataFrame(rows).to_csv(a.out, index=False)
        print(pd.DataFrame(rows).to_string(index=False))
    if many:
        pd.DataFrame(many).to_csv(a.out.with_name(a.out.stem+'_together.csv'), index=False)
        print(pd.DataFrame(many).to_string(index=False))
