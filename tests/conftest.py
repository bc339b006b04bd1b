"What every test may ask for."
import os
from pathlib import Path
import pytest

os.environ.setdefault('MPLBACKEND', 'agg')

@pytest.fixture(scope='session')
def data():
    "Folder of real scans, see README.md; the test is skipped where there is none."
    path = os.environ.get('FASTMED_DATA')
    if not path: pytest.skip('needs real scans: set FASTMED_DATA to the folder that holds them')
    if not Path(path).is_dir(): pytest.fail(f'FASTMED_DATA names {path}, which is no folder')
    return Path(path)

@pytest.fixture
def cache(tmp_path):
    "An empty folder for the store, gone after the test."
    path = tmp_path/'cache'
    path.mkdir()
    return path

@pytest.fixture(autouse=True, scope='session')
def threads():
    "One thread each when tests run side by side."
    if os.environ.get('PYTEST_XDIST_WORKER'):
        import torch
        torch.set_num_threads(1)
