"A short version of benchmarks/kills.py: killed, started again, and several processes at once."
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pandas as pd
import pytest

root = Path(__file__).resolve().parent.parent

@pytest.mark.skipif(not hasattr(os, 'fork') or not (root/'benchmarks'/'kills.py').exists(),
                    reason='needs fork, and the benchmarks of a checkout')
@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """Store, download, training and a folder of predictions: nothing corrupt, nothing changed, nothing done twice,
    nothing left behind; four processes at one store"""
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore', 'MPLBACKEND':'agg'}
    r = subprocess.run([sys.executable, root/'benchmarks'/'kills.py', '--jobs',
                        'store,download,training,predict_folder', '--kills', '2', '--seed', '7', '--together', '4',
                        '--together-jobs', 'store', '--out', tmp_path/'k.csv'], env=env, capture_output=True, text=True,
                        timeout=1800)
    assert r.returncode==0, r.stderr[-3000:]
    t,m = pd.read_csv(tmp_path/'k.csv').set_index('job'),pd.read_csv(tmp_path/'k_together.csv')
    assert (t.kills==2).all() and len(t)==4 and (t.while_writing==1).all()
    assert not t[['corrupted','changed','done_twice','left_behind']].to_numpy().any(), f'{t}\n{r.stderr[-2000:]}'
    assert not m[['failed','corrupted','changed','left_behind']].to_numpy().any(), f'{m}\n{r.stderr[-2000:]}'

BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
from fastmed.data.store import Store
from fastmed.data.preprocess import Preprocess
from pathlib import Path
p = Path(sys.argv[2])
Store(Preprocess(spacing=1.25, codes=['background','large','small']),
        sys.argv[3]).build(sorted(map(str, (p/'images').glob('*'))), sorted(map(str, (p/'labels').glob('*'))),
        workers=2)
"""
def test_two_processes_build_one_store(study, tmp_path):
    "Four that import for themselves stand in the slow test above"
    (tmp_path/'build.py').write_text(BUILD, encoding='utf-8')
    def build(_): return forked.run([tmp_path/'build.py', root, study[0], tmp_path/'s'], tmp_path, dict(os.environ))
    forked.start()                                                                         # once, not by each thread
    with ThreadPoolExecutor(2) as pool: ps = list(pool.map(build, range(2)))
    for p in ps: assert p.returncode==0, p.stderr[-2000:]
    assert len(list((tmp_path/'s'/'image').iterdir()))==len(list((tmp_path/'s'/'mask').iterdir()))==8
