"Every notebook runs, from a copy, so that nothing is written into the tree."
import os, re, shutil
from pathlib import Path
import pytest
import forked

root = Path(__file__).resolve().parent.parent
nbs = sorted((root/'nbs').glob('*.ipynb')) + sorted((root/'nbs'/'tutorials').glob('*.ipynb'))
run = 'import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1], n_workers=0)'
ansi = re.compile(r'\x1b\[[0-9;]*m')

@pytest.mark.parametrize('nb', nbs, ids=[str(o.relative_to(root/'nbs').with_suffix('')) for o in nbs])
def test_notebook(nb, tmp_path):
    if "environ['FASTMED_DATA']" in nb.read_text(encoding='utf-8') and not os.environ.get('FASTMED_DATA'): pytest.skip('needs real scans: set FASTMED_DATA to the folder that holds them')
    copy = tmp_path/nb.relative_to(root)
    copy.parent.mkdir(parents=True)
    shutil.copy(nb, copy)
    shutil.copy(root/'pyproject.toml', tmp_path)
    path = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
    env = {**os.environ, 'PYTHONPATH':path, 'PYTHONWARNINGS':'ignore', 'MPLBACKEND':'agg', 'FASTMED_MINUTES':'.2'}
    if os.environ.get('PYTEST_XDIST_WORKER'): env['OMP_NUM_THREADS'] = '1'
    (tmp_path/'run.py').write_text(run, encoding='utf-8')
    r = forked.run([tmp_path/'run.py', copy], tmp_path, env, timeout=3600)
    out = ansi.sub('', r.stdout + r.stderr)
    assert r.returncode==0 and 'Success.' in r.stdout, f'{nb.name} failed:\n' + '\n'.join(out.splitlines()[-60:])

def test_notebooks_are_there(): assert nbs, f'no notebook in {root/"nbs"}'
