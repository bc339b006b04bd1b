"Several threads ask one Learner at once, as a server does: each gets the answer that it would get alone."
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from phantoms import CODES
from torch import nn

from fastmed.all import VolumeDataLoaders, classifier_learner, load_learner, load_model, save_model
from fastmed.learn.fast import make_fast


def modes(model): return {m.training for m in model.modules()}
def state(model): return {k:v.clone() for k,v in model.state_dict().items()}
def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.fixture
def classifier(study, tmp_path):
    path,df = study
    dls = VolumeDataLoaders.from_df(df.assign(y=['a','b']*4), path, label_col='y', valid_pct=.25, spacing=1.25, size=16,
                                    bs=2, num_workers=0, device='cpu', cache=tmp_path/'s')
    return classifier_learner(dls, 'small_resnet', path=tmp_path)

def test_a_loaded_network_is_in_evaluation_and_stays_so(classifier, learner, study, tmp_path):
    fn = study[0]/study[1].image[0]
    segmenter = learner(3)
    segmenter.model.train()
    classifier.model.train()
    for learn,ask in ((classifier, 'predict'), (segmenter, 'predict_volume')):
        learn.export('m.pkl')
        save_model(learn, tmp_path/'m.safetensors')
        assert modes(learn.model)=={True}
        for loaded in (load_learner(tmp_path/'m.pkl'), load_model(tmp_path/'m.safetensors')):
            assert modes(loaded.model)=={False}
            switched = []
            for m in loaded.model.modules(): m.train = lambda *a, **k: switched.append(a)
            getattr(loaded, ask)(fn)
            assert not switched and modes(loaded.model)=={False}

def test_a_network_that_is_being_trained_is_given_back_as_it_was(learner, study):
    learn = learner(3)
    learn.model.train()
    first = [*learn.model.modules()][-1]
    first.training = False
    # a frozen norm stays frozen
    learn.predict_volume(study[0]/study[1].image[0])
    assert learn.model.training and not first.training

@pytest.mark.parametrize('how', ['classifier','masks'])
def test_threads_get_the_answers_of_one(classifier, learner, study, tmp_path, how):
    learn = classifier if how=='classifier' else learner(3)
    learn.model.train()
    save_model(learn, tmp_path/'m.safetensors')
    loaded = load_model(tmp_path/'m.safetensors')
    files = [study[0]/f for f in study[1].image]*2
    ask = (lambda f: loaded.predict(f)[2]) if how=='classifier' else loaded.predict_volume
    alone = [ask(f) for f in files]
    was = state(loaded.model)
    with ThreadPoolExecutor(4) as pool: together = list(pool.map(ask, files))
    assert all(torch.equal(a.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor)) for a,
               b in zip(alone, together)) and same(was, state(loaded.model))

@pytest.mark.parametrize('tta', [4,'flips'])
@pytest.mark.parametrize('which', ['loaded','learner'])
def test_threads_get_the_looks_of_one(classifier, study, tmp_path, which, tta):
    "Test-time augmentation draws its looks: from a generator of its own, so that threads do not draw from each other's"
    asked = load_model(save_model(classifier, tmp_path/'m.safetensors')) if which=='loaded' else classifier
    asked.model.train(which=='learner')
    files = [study[0]/f for f in study[1].image]*3
    def ask(f): return asked.predict(f, tta=tta)[2].as_subclass(torch.Tensor)
    alone = [ask(f) for f in files]
    was,draws = state(asked.model),torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool: together = list(pool.map(ask, files))
    assert all(torch.equal(a, b) for a,b in zip(alone, together)) and same(was,
            state(asked.model)) and torch.equal(draws, torch.get_rng_state())
    assert modes(asked.model)=={which=='learner'}

def test_what_others_draw_does_not_change_a_look(classifier, study, monkeypatch):
    "As another thread would, in the middle of it"
    from fastmed.all import SpatialTfm
    fn = study[0]/study[1].image[0]
    alone = classifier.predict(fn, tta=4)[2]
    draw = SpatialTfm.draw
    def disturbed(self, *args, **kwargs):
        torch.rand(3)
        return draw(self, *args, **kwargs)
    monkeypatch.setattr(SpatialTfm, 'draw', disturbed)
    assert torch.equal(classifier.predict(fn, tta=4)[2], alone)

def test_a_network_in_training_is_in_evaluation_until_the_last_is_done():
    from fastmed.core import evaluating
    net = nn.Sequential(nn.BatchNorm1d(2))
    net.train()
    a,b = evaluating(net),evaluating(net)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert modes(net)=={False}
    b.__exit__(None, None, None)
    assert modes(net)=={True}

def test_autocast_of_one_thread_is_not_ended_by_another(monkeypatch):
    "`FastForward` enters a context and leaves it: each thread its own"
    import contextlib
    import threading

    import fastmed.learn.fast as L
    wrong = []
    class Own(contextlib.nullcontext):
        def __enter__(self): self.by = threading.get_ident()
        def __exit__(self, *a): wrong.append(1) if self.by!=threading.get_ident() else None
    monkeypatch.setattr(L.contextlib, 'nullcontext', Own)
    barrier = threading.Barrier(2)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
        def forward(self, x):
            barrier.wait(10)
            x = x*self.w
            barrier.wait(10)
            return x
    monkeypatch.setattr(L, 'has_bf16', lambda d: False)
    net = make_fast(Net())
    with ThreadPoolExecutor(2) as pool: list(pool.map(net, [torch.ones(1,1,4,4)]*20))
    assert not wrong

def test_the_masks_of_a_learner_of_both_do_not_disturb_its_answers(study, tmp_path):
    path,df = study
    dls = VolumeDataLoaders.from_df(df.assign(y=['a','b']*4), path, label_col='y', mask_col='mask', codes=CODES,
                                    valid_pct=.25, spacing=1.25, size=16, bs=2, num_workers=0, device='cpu',
                                    cache=tmp_path/'s')
    learn = classifier_learner(dls, nf=4, depth=2, path=tmp_path)
    learn.model.eval()
    model = learn.model
    seen = []
    net = model.net
    net.register_forward_hook(lambda *a: seen.append(learn.model is model))
    learn.predict_volume(path/df.image[0])
    assert seen and all(seen) and learn.n_out==2
