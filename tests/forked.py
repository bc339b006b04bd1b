"""Processes that begin where `import fastmed.all` has ended, by a server that forks: importing it anew takes longer
than most of what tests do there.

They hold modules and nothing else: no network, no random state, no OpenMP threads of whoever asked. Where the import
itself matters, start an interpreter."""
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver, reduction
from pathlib import Path

SERVED = sys.platform == 'linux'

def start():
    "The server, unless it runs: it imports under the environment that each of its children has"
    if not SERVED: return
    forkserver.set_forkserver_preload(['fastmed.all', 'nbdev.test'])
    was = dict(os.environ)
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [was.get('PYTHONPATH')])])
    os.environ.update(PYTHONPATH=path, PYTHONWARNINGS='ignore', MPLBACKEND='agg')
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(was)

class Handed:
    "A descriptor that the child gets too: a pipe, a terminal"
    def __init__(self, fd): self.fd = fd
    def __reduce__(self): return _taken,(reduction.DupFd(self.fd),)

def _taken(dup): return Handed(dup.detach())

def opened(
    where, # file name, or `Handed`
    how    # flags of `os.open`
):         # descriptor
    return where.fd if isinstance(where, Handed) else os.open(where, how)

def child(
    argv,    # script and its arguments
    cwd,     # folder to run in
    env,     # all environment variables
    out, err # for what it prints: file name, or `Handed`
):
    "What the fork does: as `python script arguments` would"
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for where,fd in ((out, 1), (err, 2)): os.dup2(opened(where, os.O_WRONLY | os.O_CREAT), fd)
    # its own workers start as they do anywhere, not by a second server that has imported nothing
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    sys.stdin,sys.stdout,sys.stderr = (open(fd, 'r' if fd==0 else 'w', encoding='utf-8', closefd=False)
                                            for fd in range(3))
    sys.__stdin__,sys.__stdout__,sys.__stderr__ = sys.stdin,sys.stdout,sys.stderr
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    sys.path[:0] = [os.path.dirname(argv[0]), *filter(None, env.get('PYTHONPATH', '').split(os.pathsep))]
    import numpy
    import torch
    numpy.random.seed()
    if threads:=env.get('OMP_NUM_THREADS'): torch.set_num_threads(int(threads))
    runpy.run_path(argv[0], run_name='__main__')

def run(
    argv,         # script and its arguments
    cwd, env,     # as those of `subprocess.run`
    timeout=1800, # seconds
    stderr=None   # descriptor, such as that of a terminal; what is printed there does not come back
):                # `subprocess.CompletedProcess` with text
    "Run a script in a process of its own that has imported fastmed already. Raises `subprocess.TimeoutExpired`."
    argv = list(map(str, argv))
    if not SERVED:
        return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, timeout=timeout, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE if stderr is None else stderr, text=True,
                              stdin=subprocess.DEVNULL)
    start()
    with tempfile.TemporaryDirectory() as tmp:
        out,err = Path(tmp)/'out',Path(tmp)/'err'
        seen = str(err) if stderr is None else Handed(stderr)
        p = multiprocessing.get_context('forkserver').Process(target=child, args=(argv, str(cwd), env, str(out), seen))
        p.start()
        p.join(timeout)
        if p.exitcode is None:
            p.kill()
            p.join()
            raise subprocess.TimeoutExpired(argv, timeout)
        return (subprocess.CompletedProcess(argv, p.exitcode,
                *[o.read_text(encoding='utf-8') if o.exists() else '' for o in (out, err)]))
