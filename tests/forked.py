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
from multiprocessing import forkserver
from pathlib import Path

SERVED = sys.platform == 'linux'

def start():
    "The server, unless it runs: it imports under the environment that each of its children has"
    forkserver.set_forkserver_preload(['fastmed.all', 'nbdev.test'])
    was = dict(os.environ)
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [was.get('PYTHONPATH')])])
    os.environ.update(PYTHONPATH=path, PYTHONWARNINGS='ignore', MPLBACKEND='agg')
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(was)

def child(
    argv,    # script and its arguments
    cwd,     # folder to run in
    env,     # all environment variables
    out, err # files for what it prints
):
    "What the fork does: as `python script arguments` would"
    for name,fd in ((os.devnull, 0), (out, 1), (err, 2)):
        os.dup2(os.open(name, os.O_RDONLY if fd==0 else os.O_WRONLY | os.O_CREAT), fd)
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
    timeout=1800  # seconds
):                # `subprocess.CompletedProcess` with text
    "Run a script in a process of its own that has imported fastmed already. Raises `subprocess.TimeoutExpired`."
    argv = list(map(str, argv))
    if not SERVED:
        return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, timeout=timeout, capture_output=True,
                              text=True, stdin=subprocess.DEVNULL)
    start()
    with tempfile.TemporaryDirectory() as tmp:
        out,err = Path(tmp)/'out',Path(tmp)/'err'
        p = multiprocessing.get_context('forkserver').Process(target=child,
                                        args=(argv, str(cwd), env, str(out), str(err)))
        p.start()
        p.join(timeout)
        if p.exitcode is None:
            p.kill()
            p.join()
            raise subprocess.TimeoutExpired(argv, timeout)
        return (subprocess.CompletedProcess(argv, p.exitcode,
                *[o.read_text(encoding='utf-8') if o.exists() else '' for o in (out, err)]))
