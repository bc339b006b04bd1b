"Two processes that train together (gloo, on the CPU): no file is lost, and they stay together."
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
from phantoms import write_case

import fastmed

SCRIPT = '''
import os, sys, torch
from pathlib import Path
from fastmed.all import *
from fastmed.metrics.masks import DiceCounts
rank,tmp = int(os.environ['RANK']),Path(sys.argv[1])
torch.set_num_threads(1)
torch.distributed.init_process_group('gloo', init_method='env://')
df = pd.read_csv(tmp/'cases.csv')
dls = VolumeDataLoaders.from_df(df, tmp, codes=['background','large','small'], patch=16, bs=2, samples_per_case=4,
                                cache=tmp/f's{rank}', device='cpu', batch_tfms=None)
set_seed(rank)
learn = unet3d_learner(dls, nf=4, depth=2, path=tmp)
def said(s): (tmp/f'{s}_{rank}').touch()

learn.save('w'); distrib_barrier()
learn.load('w'); assert (tmp/'models'/'w.pth').stat().st_size>1000
learn.export('m.pkl'); distrib_barrier()
assert (tmp/'m.pkl').stat().st_size>1000 and learn.dls is dls; said('files')

for cb in (DiceCallback(), ResumeCallback(), PictureCallback()):
    with learn.no_bar(), learn.no_logging():
        try: learn.fit(1, cbs=cb)
        except InputError as e: assert 'one process, and 2 train here' in str(e), e
        else: assert False, cb
said('refused')

class Slow(Callback):
    "The second process has the slower clock: alone it would end elsewhere, with other rates"
    def before_fit(self):
        if rank: self.learn.budget.t0 -= 1.
    order = 63
with learn.no_bar(), learn.no_logging(): learn.fit_for(.05, cbs=Slow())
both = [None, None]; torch.distributed.all_gather_object(both, list(learn.recorder.lrs))
assert both[0]==both[1] and len(both[0]); said('together')

c = DiceCounts(); m = DiceScore(1, counts=c)
learn.dl,learn.pred,learn.yb = dls.valid,torch.zeros(1,2,4,4,4),(torch.zeros(1,4,4,4, dtype=torch.long),)
learn.pred[:,1] = 1 if rank else -1
learn.yb[0][:] = 1
m.reset(); m.accumulate(learn)
assert abs(m.value-2/3)<1e-6, m.value                       # half of the voxels are found, over both processes
said('counted')

import types
from torch.nn.parallel import DistributedDataParallel
class Accelerator:
    "What fastai asks of accelerate, which need not be here"
    def __init__(self, **kwargs): pass
    def prepare(self, model): return DistributedDataParallel(model)
    def backward(self, loss): loss.backward()
sys.modules['accelerate'] = types.ModuleType('accelerate'); sys.modules['accelerate'].Accelerator = Accelerator
from fastai.distributed import DistributedDL
def broadcast(self, t, rank):                                # fastai's wants a GPU
    t = LongTensor(t); torch.distributed.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = broadcast
alone = VolumeDataLoaders.from_df(df.assign(valid=[False,False]+[True]*3), tmp, codes=['background','large','small'],
                                  valid_col='valid', patch=16, bs=2, cache=tmp/f's{rank}', device='cpu', num_workers=0)
x = torch.cat([b[0] for b in alone.valid]).as_subclass(torch.Tensor)
for make in (unet3d_learner, restoration_learner):
    set_seed(0)
    learn = make(alone, nf=4, depth=2, path=tmp)
    with learn.no_bar(), learn.distrib_ctx(sync_bn=False):
        if make is unet3d_learner:
            seen,p,t = learn.get_preds(with_input=True)
            assert torch.equal(seen.as_subclass(torch.Tensor), x); said('order')
        both = [None, None]; torch.distributed.all_gather_object(both, learn.validate()[-1])
        assert both[0]==both[1], both
said('same')
'''

@pytest.fixture(scope='module')
def marks(tmp_path_factory):
    "What two processes that run `SCRIPT` have reached"
    tmp = tmp_path_factory.mktemp('two')
    pd.DataFrame([write_case(tmp, f'c{i}', np.eye(4), (16,16,16), i) for i in range(5)]).to_csv(tmp/'cases.csv',
            index=False)
    (tmp/'script.py').write_text(SCRIPT, encoding='utf-8')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    path = os.pathsep.join(filter(None, [str(Path(fastmed.__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, 'PYTHONPATH':path, 'PYTHONWARNINGS':'ignore', 'MPLBACKEND':'agg', 'OMP_NUM_THREADS':'1',
           'WORLD_SIZE':'2', 'MASTER_ADDR':'127.0.0.1', 'MASTER_PORT':str(port)}
    def run(rank): return forked.run([tmp/'script.py', tmp], tmp, {**env, 'RANK':str(rank)}, timeout=1200).stderr
    forked.start()                                                                         # once, not by each thread
    with ThreadPoolExecutor(2) as pool: errs = list(pool.map(run, (0,1)))
    return {o.name for o in tmp.glob('*_[01]')},'\n'.join(e[-1500:] for e in errs)

@pytest.mark.parametrize('what', ['files','refused','together','counted','order','same'])
def test_two_processes(marks, what):
    """Save and export are the first one's; what works in one process alone says so; `fit_for` ends together, with the
    same rates; Dice counts the cases of both"""
    reached,errs = marks
    assert {f'{what}_0',f'{what}_1'}<=reached, errs
