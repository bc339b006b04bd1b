"""What a training and a prediction need, said before they begin: refused, warned of, let through; a real lack of memory
in words."""
import shutil
import warnings

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

import fastmed.predict.memory as M
from fastmed.all import Ensemble, TensorVolume
from fastmed.core import ResourceError
from fastmed.io.guard import _Group
from fastmed.predict.memory import MemoryCallback, free_memory, memory_estimate, memory_parts


def fit(l, *cbs):
    with l.no_bar(), l.no_logging(): l.fit(1, cbs=list(cbs))

def need(l):
    fixed,each = M._needs(l)
    return fixed+l.dls.train.bs*each

@pytest.mark.parametrize('ndim', [3,2])
def test_refused_warned_let_through(learner, ndim):
    l = learner(ndim)
    n = need(l)/1e9
    with pytest.raises(ResourceError,
                       match=r'^(T|.*T)raining on this computer takes about .* GB more .* are allowed') as e:
        fit(l, MemoryCallback(n/1.4))
    assert 'Exception occured' not in str(e.value) and isinstance(e.value, MemoryError)
    with pytest.warns(UserWarning, match='may not fit'): fit(l, MemoryCallback(n/1.1))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        l._checked = fit(l, MemoryCallback(n*1.5))

def test_the_batch_that_is_named_fits(learner):
    l = learner(3)
    fixed,each = M._needs(l)
    free = (fixed+5.5*each)/.8
    assert 'A batch of 5 fits: bs=5' in M._memory_advice(l, .8*free) and memory_estimate(l,
            bs=5)-memory_parts(l)['weights']<=free

def test_no_larger_batch_is_advised_than_the_one_that_failed(learner):
    "With a batch of 1, one of 8 was said to fit"
    l = learner(3)
    l.dls.train.bs = 1
    with pytest.raises(ResourceError, match='with a batch of 1') as e, M.memory_explained(l):
        raise RuntimeError('out of memory')
    assert 'A batch of' not in str(e.value)

def test_a_network_without_a_convolution_has_its_parts():
    "The check of the memory was passed over"
    class Point(torch.nn.Module):
        n_in,n_out,divisor = 1,2,(1,1,1)
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
        def forward(self, x): return torch.cat([x*w for w in self.weight], 1)
    assert memory_parts(Point(), (8,8,8), bs=2)['activations']>0

def test_what_cannot_be_counted_is_let_through(learner, monkeypatch):
    l = learner(3)
    def broken(*a, **k): raise RuntimeError('no such thing')
    monkeypatch.setattr(M, 'memory_parts', broken)
    fit(l, MemoryCallback(1e-6))

def test_another_error_stays(learner):
    l = learner(3)
    def loss(*a): raise RuntimeError('shapes differ')
    l.loss_func = loss
    with pytest.raises(RuntimeError, match='shapes differ') as e: fit(l)
    assert not isinstance(e.value, ResourceError)

def test_a_prediction_that_cannot_fit(learner, monkeypatch):
    import fastmed.predict.predict  # noqa: F401
    l = learner(3)
    t = TensorVolume(torch.randn(1,24,24,24), affine=np.eye(4))
    t.meta = dict(fn='huge.nii')
    with l.no_bar(): assert l.predict_volume(t).shape==(24,24,24)
    monkeypatch.setattr(M, 'free_memory', lambda device=None: 1e6)
    with pytest.raises(ResourceError, match='huge.nii: 24×24×24 voxels.*GB are free'), l.no_bar(): l.predict_volume(t)

def test_free_memory_obeys_the_group(monkeypatch):
    assert 0<free_memory('cpu')<2**50
    monkeypatch.setattr('fastmed.io.guard._control_groups', lambda: [_Group('', 'most', 'used', 'spare')])
    monkeypatch.setattr('fastmed.io.guard._kernel_number', lambda fn, key=None: {'most':20000, 'used':8000,
                        'memory.stat':345}.get(str(fn)))
    assert free_memory('cpu')==12345

@pytest.mark.parametrize('error',
        [torch.OutOfMemoryError('CUDA out of memory'),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9999 bytes"),
        MemoryError('no memory')])
def test_out_of_memory_inside_a_fit(learner, error):
    class Full(Callback):
        def after_pred(self): raise error
    l = learner(3)
    with pytest.raises(ResourceError, match='ran out while training with a batch of') as e: fit(l, Full())
    assert e.value.__cause__ is error

@pytest.mark.parametrize('error',
        [torch.OutOfMemoryError('CUDA out of memory'),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9999 bytes"),
        MemoryError('no memory')])
def test_out_of_memory_inside_a_prediction(learner, study, tmp_path, error):
    "The scan is named and the mend; in a folder the other scans go on; another error stays what it is"
    path,df = study
    l = learner(3)
    src = tmp_path/'in'
    src.mkdir()
    names = ['a.nii','b.nii']
    for n,fn in zip(names, df.image): shutil.copy(path/fn, src/n)
    calls = [error]
    def full(*a):
        if calls: raise calls.pop()
    l.model.register_forward_pre_hook(full)
    with l.no_bar(), pytest.raises(ResourceError,
                                   match=r'a\.nii: the memory of (the GPU|this computer) ran out while '
                                         r'predicting.*[Cc]rop') as e:
        l.predict_volume(src/'a.nii')
    assert e.value.__cause__ is error and l.predict_volume(src/'a.nii').ndim==3
    calls.append(error)
    r = l.predict_folder(src, tmp_path/'out', images='*.nii')
    assert r.status.str.startswith('error').tolist()==[True,False] and (tmp_path/'out'/'b.nii.gz').exists()
    calls.append(error)
    with pytest.raises(ResourceError, match='a.nii: the memory of'): Ensemble([l]).predict_volume(src/'a.nii')
    calls.append(RuntimeError('shapes differ'))
    with pytest.raises(RuntimeError, match='shapes differ') as e: l.predict_volume(src/'a.nii')
    assert not isinstance(e.value, ResourceError)
