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
def no_store_at_home(tmp_path_factory):
    "Nothing is kept in the store of whoever runs the tests, unless FASTMED_CACHE names one."
    there = 'FASTMED_CACHE' in os.environ
    if not there: os.environ['FASTMED_CACHE'] = str(tmp_path_factory.mktemp('home')/'store')
    yield
    if not there: os.environ.pop('FASTMED_CACHE', None)

@pytest.fixture(autouse=True, scope='session')
def threads():
    "One thread each when tests run side by side."
    if os.environ.get('PYTEST_XDIST_WORKER'):
        import torch
        torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def figures():
    "Close what a test has drawn."
    yield
    import sys
    if plt:=sys.modules.get('matplotlib.pyplot'): plt.close('all')

@pytest.fixture(scope='session')
def study(tmp_path_factory):
    "Eight phantoms of four subjects on grids of three orders and several spacings: (folder, DataFrame)."
    import pandas as pd
    from phantoms import affine_of, write_case
    path = tmp_path_factory.mktemp('study')
    grids = [('RAS',(1,1,1),(20,22,18)), ('LAS',(1,1,1),(20,20,20)), ('PSR',(1,1,1.25),(22,18,16)),
            ('RAS',(1.1,.9,1),(18,24,20))]
    rows = [dict(write_case(path, f'c{i}', affine_of(c, s, (3*i,-2*i,i)), shape, seed=i), subject=f's{i//2}')
                 for i in range(8) for c,s,shape in [grids[i%4]]]
    df = pd.DataFrame(rows)
    df.to_csv(path/'cases.csv', index=False)
    return path,df

@pytest.fixture(scope='session')
def loaders(study, tmp_path_factory):
    "DataLoaders of the study, 3D and 2D: dict ndim → DataLoaders."
    from phantoms import CODES

    from fastmed.all import SliceDataLoaders, VolumeDataLoaders
    path,df = study
    kw = dict(path=path, codes=CODES, valid_pct=.25, spacing=1.25, patch=16, bs=2, samples_per_case=2, num_workers=0,
            device='cpu', cache=tmp_path_factory.mktemp('cache'))
    return {3:VolumeDataLoaders.from_df(df, **kw), 2:SliceDataLoaders.from_df(df, axis=2, context=1, **kw)}

def trained(loaders):
    "What tiny networks learn in a few epochs: dict ndim → state dict."
    from fastmed.all import set_seed, unet2d_learner, unet3d_learner
    res = {}
    for nd,f in ((3,unet3d_learner),(2,unet2d_learner)):
        set_seed(0)
        learn = f(loaders[nd], nf=4, depth=2)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(12, 3e-2)
        res[nd] = {k:v.clone() for k,v in learn.model.state_dict().items()}
    return res

@pytest.fixture(scope='session')
def weights(loaders, tmp_path_factory):
    "What `trained` learnt, once a session: the first worker trains, the others read."
    import torch
    from filelock import FileLock
    here = tmp_path_factory.getbasetemp()
    fn = (here.parent if os.environ.get('PYTEST_XDIST_WORKER') else here)/'weights.pth'
    with FileLock(f'{fn}.lock'):
        if not fn.exists(): torch.save(trained(loaders), fn)
    return torch.load(fn)

@pytest.fixture
def learner(loaders, weights, tmp_path):
    "`learner(ndim)` gives a trained Learner of its own, which writes into a folder of its own."
    from fastmed.all import unet2d_learner, unet3d_learner
    def make(ndim=3, **kwargs):
        dls = type(loaders[ndim])(*loaders[ndim].loaders, path=loaders[ndim].path, device=loaders[ndim].device)
        learn = (unet3d_learner if ndim==3 else unet2d_learner)(dls, nf=4, depth=2, path=tmp_path, **kwargs)
        learn.model.load_state_dict(weights[ndim])
        return learn
    return make

@pytest.fixture(scope='session')
def fresh(study, loaders, weights, tmp_path_factory):
    """What exported Learners answer here, and what they answer in a fresh process, beside a second pipeline with other
    settings: (here, there), dicts of arrays."""
    import numpy as np
    import torch
    from phantoms import ANSWERS, affine_of, python, write_case

    from fastmed.all import unet2d_learner, unet3d_learner
    path,df = study
    tmp = tmp_path_factory.mktemp('fresh')
    new = write_case(tmp, 'new', affine_of('PIL', (.8,1.4,2.), (5,6,7)), (34,22,15), seed=99)['image']
    ns = {}
    exec(ANSWERS, ns)
    here = {}
    for nd,f in ((3,unet3d_learner),(2,unet2d_learner)):
        learn = f(loaders[nd], nf=4, depth=2, path=tmp)
        learn.model.load_state_dict(weights[nd])
        learn.export(f'm{nd}.pkl')
        answers = ns['answers'](learn, str(tmp/new), [str(path/o) for o in df.image[:3]])
        here.update({f'{k}_{nd}':v for k,v in answers.items()})
    python(ANSWERS+f"""
import sys, torch, pandas as pd
tmp,path = sys.argv[1:]
torch.set_num_threads({torch.get_num_threads()})
df = pd.read_csv(f'{{path}}/cases.csv')
other = VolumeDataLoaders.from_df(df, path, spacing=3., patch=8, normalize='minmax', codes=['nothing','a','b'],
                                  cache=f'{{tmp}}/other', device='cpu', num_workers=0)
res = {{}}
for nd in (3,2):
    learn = load_learner(f'{{tmp}}/m{{nd}}.pkl')
    unet3d_learner(other, nf=2, depth=2).predict_volume(f'{{tmp}}/{new}')
    given = answers(learn, f'{{tmp}}/{new}', [f'{{path}}/{{o}}' for o in df.image[:3]])
    res.update({{f'{{k}}_{{nd}}':v for k,v in given.items()}})
np.savez(f'{{tmp}}/there.npz', **res)
""", tmp, path)
    with np.load(tmp/'there.npz') as z: return here,{k:z[k] for k in z.files}
