"Every notebook runs, from a copy, so that nothing is written into the tree."
import json
import os
import re
import shutil
from pathlib import Path

import forked
import pytest

root = Path(__file__).resolve().parent.parent
nbs = sorted((root/'nbs').rglob('*.ipynb'))
run = 'import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1], n_workers=0)'
ansi = re.compile(r'\x1b\[[0-9;]*m')

# what trains for long, or reads a set of scans as a whole: left to `make test-all`
SLOW = ('learn/07_learner', 'learn/11_pretrain', 'study/03_interpret', 'learn/16_ensemble', 'study/08_compare',
        'study/10_crossval', 'data/15_check', 'learn/09_modelformat', 'data/16_leaks',
    'tutorials/01_segmentation', 'tutorials/02_slices_or_volumes', 'tutorials/03_know_your_data',
    'tutorials/05_brain_tissue', 'tutorials/07_whole_scans',
    'tutorials/08_new_patients', 'tutorials/09_know_then_segment_2d')
names = {str(o.relative_to(root/'nbs').with_suffix('')):o for o in nbs}

def run_copy(
    copy, # notebook
    tmp   # folder to run in
):        # `subprocess.CompletedProcess`
    "Run a notebook as nbdev-test does, beside this tree's fastmed"
    shutil.copy(root/'pyproject.toml', tmp)
    path = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
    env = {**os.environ, 'PYTHONPATH':path, 'PYTHONWARNINGS':'ignore', 'MPLBACKEND':'agg', 'FASTMED_MINUTES':'.2'}
    if os.environ.get('PYTEST_XDIST_WORKER'): env['OMP_NUM_THREADS'] = '1'
    (tmp/'run.py').write_text(run, encoding='utf-8')
    return forked.run([tmp/'run.py', copy], tmp, env, timeout=3600)

def passed(r): return r.returncode==0 and 'Success.' in r.stdout

@pytest.mark.parametrize('nb', [pytest.param(o, id=n, marks=[pytest.mark.slow]*(n in SLOW)) for n,o in names.items()])
def test_notebook(nb, tmp_path):
    if "environ['FASTMED_DATA']" in nb.read_text(encoding='utf-8') and not os.environ.get('FASTMED_DATA'):
        pytest.skip('needs real scans: set FASTMED_DATA to the folder that holds them')
    copy = tmp_path/nb.relative_to(root)
    copy.parent.mkdir(parents=True)
    shutil.copy(nb, copy)
    r = run_copy(copy, tmp_path)
    out = ansi.sub('', r.stdout + r.stderr)
    assert passed(r), f'{nb.name} failed:\n' + '\n'.join(out.splitlines()[-60:])

def test_a_broken_notebook_fails(tmp_path):
    "An assertion that does not hold, beside one that does; and each run has a random state of its own"
    cell = dict(cell_type='code', execution_count=None, id='a', metadata={}, outputs=[])
    said = []
    for n,last in (('whole','True'), ('broken','False')):
        code = (f"import numpy as np\nfrom pathlib import "
                f"Path\nPath('{n}.txt').write_text(str(np.random.rand()))\nassert {last}")
        (tmp_path/f'{n}.ipynb').write_text(json.dumps(dict(cells=[{**cell, 'source':code}], metadata={}, nbformat=4,
                nbformat_minor=5)))
        r = run_copy(tmp_path/f'{n}.ipynb', tmp_path)
        assert passed(r)==(n=='whole'), r
        said.append((tmp_path/f'{n}.txt').read_text())
    assert 'AssertionError' in ansi.sub('', r.stderr) and said[0]!=said[1]

def test_notebooks_are_there():
    assert nbs, f'no notebook in {root/"nbs"}'
    assert set(SLOW) <= set(names), f'no notebook: {set(SLOW)-set(names)}'
