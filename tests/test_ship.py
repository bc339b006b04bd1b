"A model file: the same bits out of it, nothing run by it, and what is refused."
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import *
from torch import nn

from fastmed.all import *
from fastmed.data.recipe import get_plan
from fastmed.learn import modelfile, modelformat
from fastmed.learn.ensemble import load_model
from fastmed.learn.modelfile import save_model
from fastmed.learn.modelmeta import SavedLearner
from fastmed.learn.onnx import export_onnx, load_onnx
from fastmed.predict.tta import tta_views
from fastmed.study.arms import seen_cases

for k in [o for o in globals() if o.startswith('test')]: del globals()[k]    # fastcore's own

def same_bits(a, b): return a.shape==b.shape and a.cpu().numpy().tobytes()==b.cpu().numpy().tobytes()

@pytest.fixture
def scan(tmp_path):
    return tmp_path/write_case(tmp_path, 'new', affine_of('PIL', (.8,1.4,2.), (5,6,7)), (34,22,15), seed=99)['image']

@pytest.fixture
def saved(learner, tmp_path):
    "(Learner, its file)"
    learn = learner(3)
    return learn,save_model(learn, tmp_path/'m.safetensors')

# ---- what goes in comes out

@pytest.mark.parametrize('ndim,kw', [(3,{}), (2,{}), (3,dict(fast=False)), (2,dict(fast=False))])
def test_the_same_bits(learner, scan, tmp_path, ndim, kw):
    "Trained networks of ours, slices with neighbours too: masks and probabilities, every way of asking"
    learn = learner(ndim, **kw)
    back = load_model(save_model(learn, tmp_path/'m.safetensors'), 'cpu')
    asks = [dict(), dict(tta=True), dict(overlap=.3), dict(post='keep_largest')] + ([dict(axes='all')] if ndim==2
            else [dict(tta=(0,2))])
    for ask in asks:
        (m,p),(m2,p2) = learn.predict_volume(scan, proba=True, **ask),back.predict_volume(scan, proba=True, **ask)
        assert same_bits(m, m2) and same_bits(p, p2) and np.array_equal(m.affine, m2.affine), ask
    assert len(np.unique(m.numpy()))>1, 'the prediction is empty, so this test shows nothing'

SMALL = [(3,'UNet',dict(deep_supervision=True, nf=4, depth=3)),
        (3,'UNet',dict(nf=4, depth=2, act=nn.ReLU, norm='batch', convs=1)),
        (3,'UNet',dict(nf=4, depth=2, strides=[(1,2,2)])), (2,'UNet',dict(nf=4, depth=2, act=nn.GELU)),
        (3,'UNet',dict(nf=4, depth=2, n_out=1)),
         (3,'SegResNet',dict(init_filters=8)), (2,'SegResNet',dict(init_filters=8, norm=('GROUP',{'num_groups':4}))),
        (3,'DynUNet',dict(strides=[1,2,2], filters=[4,8,16], deep_supervision=True, deep_supr_num=1,
        loss_func=DeepSupervisionLoss(DiceCELoss()))), (3,'monai.UNet',dict(channels=(4,8), strides=(2,))),
         (3,'UNETR',dict(feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2)),
        (2,'BasicUNet',dict(features=(4,4,8,8,8,4)))]

def test_flips_of_the_augmentation_are_kept(study, scan, tmp_path):
    "Test-time augmentation looks where training looked"
    path,df = study
    learn = unet3d_learner(VolumeDataLoaders.from_df(df, path=path, codes=['background','large','small'], valid_pct=.25,
                                                     spacing=1.25, patch=16, bs=2, samples_per_case=1, num_workers=0,
                                                     device='cpu', cache=tmp_path, batch_tfms=volume_tfms(flips=(0,2))),
                                                     nf=4, depth=2, path=tmp_path)
    back = load_model(save_model(learn, tmp_path/'m.safetensors'), 'cpu')
    assert len(tta_views(learn))==4 and tta_views(back)==tta_views(learn)
    assert same_bits(learn.predict_volume(scan, tta=True, proba=True)[1],
                     back.predict_volume(scan, tta=True, proba=True)[1])

@pytest.mark.parametrize('ndim,arch,kw', SMALL, ids=[f'{a}{n}d-{i}' for i,(n,a,_) in enumerate(SMALL)])
@pytest.mark.parametrize('fast', (True,False))
def test_networks_by_name(loaders, study, scan, tmp_path, ndim, arch, kw, fast):
    """Deep supervision, other norms and activations, a sigmoid, MONAI's networks: after a step of training, so that
    running statistics count"""
    path,df = study
    dls = loaders[ndim]
    if kw.get('n_out')==1:
        dls = VolumeDataLoaders.from_df(df, path=path, codes={'background':0,'all':[1,2]}, valid_pct=.25, patch=16,
                                        bs=2, samples_per_case=1, num_workers=0, device='cpu', cache=tmp_path)
    learn = (unet3d_learner if ndim==3 else unet2d_learner)(dls, arch=arch, fast=fast, path=tmp_path, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    back = load_model(save_model(learn, tmp_path/'m.safetensors'), 'cpu')
    (m,p),(m2,p2) = learn.predict_volume(scan, proba=True),back.predict_volume(scan, proba=True)
    assert same_bits(m, m2) and same_bits(p, p2)
    again = load_model(save_model(back, tmp_path/'again.safetensors'), 'cpu')
    assert same_bits(p, again.predict_volume(scan, proba=True)[1])

def test_a_class_of_monai_is_known_by_its_name(loaders, tmp_path):
    from monai.networks.nets import UNet as MonaiUNet
    learn = unet3d_learner(loaders[3], arch=MonaiUNet, channels=(4,8), strides=(2,))
    assert load_model(save_model(learn, tmp_path/'m.safetensors'), 'cpu').arch=='monai.UNet'

def test_fresh_process_and_no_pickle(learner, study, scan, tmp_path):
    """In a process that kills itself when anything is unpickled, run or fetched, the file gives the answers of the
    Learner"""
    path,df = study
    ns = {}
    exec(ANSWERS, ns)
    files = [str(path/o) for o in df.image[:3]]
    for nd in (3,2): save_model(learner(nd), tmp_path/f'm{nd}.safetensors')
    here = {nd:ns['answers'](learner(nd), str(scan), files) for nd in (3,2)}
    python(ANSWERS+f"""
import sys, torch
torch.set_num_threads({torch.get_num_threads()})
from fastmed.learn.ensemble import load_model
tmp,new,*files = sys.argv[1:]
import scipy.ndimage
armed = True
def hook(event, args):
    if armed and event in ('pickle.find_class','subprocess.Popen','os.system','socket.connect','urllib.Request',
                           'os.exec','os.posix_spawn'):
        print(event, args, flush=True)
        import os
        os._exit(3)
sys.addaudithook(hook)
learns = {{nd:load_model(f'{{tmp}}/m{{nd}}.safetensors', 'cpu') for nd in (3,2)}}
for nd,l in learns.items(): l.predict_volume(new)
armed = False
for nd,l in learns.items(): np.savez(f'{{tmp}}/there{{nd}}.npz', **answers(l, new, files))
""", tmp_path, scan, *files)
    for nd in (3,2):
        with np.load(tmp_path/f'there{nd}.npz') as z:
            for k,v in here[nd].items():
                assert v.shape==z[k].shape and v.tobytes()==z[k].tobytes(), f'{k} of {nd}D differs in a fresh process'

def test_loading_calls_no_unpickler(saved, monkeypatch):
    def never(*a, **k): raise AssertionError('unpickled')
    for o,n in ((torch,'load'),(pickle,'load'),(pickle,'loads'),(pickle,'Unpickler')): monkeypatch.setattr(o, n, never)
    assert isinstance(load_model(saved[1], 'cpu'), SavedLearner)

def test_folder_evaluation_and_post(learner, study, tmp_path):
    path,df = study
    df = df.assign(image=[path/o for o in df.image], mask=[path/o for o in df['mask']])
    learn = learner(3)
    back = load_model(save_model(learn, tmp_path/'m.safetensors', post=['keep_largest','fill_holes'],
                      evaluation=learn.evaluate(df)), 'cpu')
    pd.testing.assert_frame_equal(pd.DataFrame(back.evaluate(df)),
            pd.DataFrame(learn.evaluate(df, post=['keep_largest','fill_holes'])))
    pd.testing.assert_frame_equal(pd.DataFrame(back.evaluate(df, post=())), pd.DataFrame(learn.evaluate(df)))
    a = back.predict_folder(path/'images', tmp_path/'out', '*.nii')
    assert (a.status=='ok').all()
    want = learn.predict_volume(df.image[0], post=['keep_largest','fill_holes'])
    assert np.array_equal(load_mask(a['mask'][0]).numpy(), want.numpy()) and same_bits(back.predict(df.image[0])[0],
                                      want)
    assert back.facts['evaluation']['all']['mean']==pytest.approx(learn.evaluate(df).summary().loc['all','mean'])
    assert all(o in repr(back) for o in ('UNet', 'large', 'keep_largest', 'zscore', '0 cases')), repr(back)
    with pytest.raises(ValueError, match='no cases'): back.evaluate()
    with pytest.raises(TypeError, match='nonsense'): back.evaluate(df, nonsense=1)

def test_a_loaded_model_trains_on(saved, loaders):
    back = load_model(saved[1], 'cpu')
    back.dls = loaders[3]
    with back.no_bar(), back.no_logging(): back.fit_one_cycle(1, 1e-3)
    assert set(back.saw(loaders[3].train_ds.items))==set(map(str, loaders[3].train_ds.items.case))

def test_facts_tell_no_names(loaders, study, tmp_path):
    path,_ = study
    learn = unet3d_learner(loaders[3], nf=4, depth=2, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.seen = {f'MUELLER_{k}':f'Anna-{v}' for k,v in learn.seen.items()}
    fn = save_model(learn, tmp_path/'m.safetensors',
            evaluation=learn.evaluate(pd.DataFrame([dict(case='MUELLER', image=path/o.image, mask=path/o['mask']) for _,
            o in study[1][:2].iterrows()])))
    b = fn.read_bytes()
    for s in ('MUELLER', 'Anna', str(path), str(tmp_path), os.path.basename(str(path))): assert s.encode() not in b, s
    back = load_model(fn, 'cpu')
    assert back.facts['cases']==len(learn.seen) and set(back.facts['metrics'])>={'train_loss','valid_loss'}
    name,subject = next(iter(learn.seen.items()))
    assert back.saw(pd.DataFrame([dict(case=name), dict(case='other')]))==[name]
    assert back.saw(pd.DataFrame([dict(case='x', subject=subject), dict(case='y', subject='z')]))==['x']

def test_fingerprints_are_salted(learner, tmp_path):
    """Two models that know the same cases share no fingerprint, so that no table of names fits both; and they know a
    case as before"""
    learn = learner(3)
    learn.seen = names = {'c1':'s1', 'c2':'s1', 'c3':'s3'}
    fn = save_model(learn, tmp_path/'a.safetensors')
    nn.init.constant_(learn.model.heads[0].bias, .1)
    other = load_model(save_model(learn, tmp_path/'b.safetensors'), 'cpu')
    one = load_model(fn, 'cpu')
    assert not set(one.facts['seen']['case']) & set(other.facts['seen']['case']) and one.facts['cases']==other.facts[
            'cases']==len(names)
    assert hashlib.sha256(f'case\0{next(iter(names))}'.encode()).hexdigest()[:16].encode() not in fn.read_bytes()
    df = pd.DataFrame([dict(case=k) for k in [*names, 'nobody']]+[dict(case='x', subject=v) for v in names.values()])
    assert one.saw(df)==other.saw(df)==[*names]+['x']*len(names)
    again = load_model(save_model(one, tmp_path/'c.safetensors'), 'cpu')
    assert again.facts['seen']==one.facts['seen'] and again.saw(df)==one.saw(df)
    # trained on, with one more
    one.seen = {**one.seen, **names, 'new':'new'}
    again = load_model(save_model(one, tmp_path/'c.safetensors'), 'cpu')
    assert again.facts['cases']==len(names)+1 and again.saw(pd.DataFrame([dict(case='new')]))==['new']

def test_names_may_be_left_out(learner, tmp_path):
    learn = learner(3)
    learn.seen = {'c1':'s1', 'c2':'s1'}
    back = load_model(save_model(learn, tmp_path/'m.safetensors', seen=False), 'cpu')
    df = pd.DataFrame([dict(case=k) for k in learn.seen])
    assert back.facts['seen'] is None and back.facts['cases']==len(learn.seen) and back.saw(df)==[] and not back.seen
    e = load_model(save_model(Ensemble([learn]), tmp_path/'e.safetensors', seen=False), 'cpu')
    assert e.saw(df)==[] and Ensemble([learn]).saw(df)==[*learn.seen]
    with pytest.warns(UserWarning, match='has no record of its training cases'):
        try: compare_learners({'a':back}, df)
        except Exception: pass

@pytest.mark.parametrize('seen', [True,False])
def test_an_exported_learner_tells_no_names(loaders, study, tmp_path, seen):
    "Of cases and subjects: neither in the memory of the Learner nor in that of a callback"
    learn = unet3d_learner(loaders[3], nf=4, depth=2, path=tmp_path)
    learn.seen = {'MUELLER_1':'Anna-1', 'MUELLER_2':'Anna-1'}
    learn.export('e.pkl', seen=seen)
    b = (tmp_path/'e.pkl').read_bytes()
    assert learn.seen=={'MUELLER_1':'Anna-1', 'MUELLER_2':'Anna-1'}
    import io
    import zipfile
    b = b''.join(zipfile.ZipFile(io.BytesIO(b)).read(o) for o in zipfile.ZipFile(io.BytesIO(b)).namelist())
    assert b'MUELLER' not in b and b'Anna' not in b
    back = load_learner(tmp_path/'e.pkl')
    df = pd.DataFrame([dict(case='MUELLER_2'), dict(case='x', subject='Anna-1'), dict(case='y')])
    assert seen_cases(back, df)==(['MUELLER_2','x'] if seen else [])

def test_a_file_of_format_2_knows_its_cases(learner, saved, tmp_path):
    "Its fingerprints had no salt"
    b = saved[1].read_bytes()
    seen = {'c1':'s1', 'c2':'s1', 'c3':'s3'}
    names = list(seen)
    def digest(kind, o): return hashlib.sha256(f'{kind}\0{o}'.encode()).hexdigest()[:16]
    def edit(m):
        m['format'] = 2
        m.pop('reasons')
        m['training']['seen'] = dict(case=sorted(digest('case', o) for o in names),
                subject=sorted({digest('subject', o) for o in seen.values()}))
    (tmp_path/'old').write_bytes(forge(b, edit))
    back = load_model(tmp_path/'old', 'cpu')
    df = pd.DataFrame([dict(case=o) for o in [*names, 'nobody']]+[dict(case='x', subject='s3')])
    assert back.saw(df)==[*names, 'x'] and load_model(save_model(back, tmp_path/'new'), 'cpu').saw(df)==[*names, 'x']

def test_the_reasons_of_the_plan_are_kept(saved, tmp_path):
    back = load_model(saved[1], 'cpu')
    plan = get_plan(saved[0].dls)
    assert plan.reasons and get_plan(back.dls).reasons==plan.reasons and repr(get_plan(back.dls))==repr(plan)
    assert get_plan(load_model(save_model(back, tmp_path/'again'), 'cpu').dls).reasons==plan.reasons
    refused(forge(saved[1].read_bytes(), put({'patch':7}, 'reasons')), tmp_path/'bad', 'reasons as text')

def test_saving_and_loading_draw_nothing(learner, tmp_path):
    learn = learner(3)
    learn.model.train()
    states = torch.get_rng_state(),np.random.get_state()[1].copy()
    load_model(save_model(learn, tmp_path/'m.safetensors'), 'cpu')
    assert torch.equal(states[0],
                       torch.get_rng_state()) and (states[1]==np.random.get_state()[1]).all() and learn.model.training

def test_the_same_learner_gives_the_same_bytes(learner, tmp_path):
    learn = learner(2)
    a,b = [save_model(learn, tmp_path/f'{i}.safetensors').read_bytes() for i in range(2)]
    assert a==b

def test_fastais_own_save_stays(learner):
    import fastai.learner as f

    import fastmed.learn.learner as l
    assert l.save_model is f.save_model and f.save_model is not save_model and f.load_model is not load_model
    learn = learner(3)
    w = learn.model.state_dict()['heads.0.bias'].clone()
    learn.save('w')
    nn.init.zeros_(learn.model.heads[0].bias)
    learn.load('w')
    assert torch.equal(learn.model.heads[0].bias, w)

# ---- what is not saved

class OwnNet(nn.Sequential):
    def __init__(self, n_in, n_out, ndim=3, nf=4):
        conv = [nn.Conv2d,nn.Conv3d][ndim-2]
        super().__init__(conv(n_in, nf, 3, padding=1), [nn.BatchNorm2d,nn.BatchNorm3d][ndim-2](nf), nn.ReLU(),
                         conv(nf, n_out, 1))
        self.divisor = (1,)*ndim

class Own(nn.Conv3d):
    divisor = (1,1,1)
    def __init__(self, n_in, n_out): super().__init__(n_in, n_out, 3, padding=1)

def test_a_network_without_a_name(loaders, learner, tmp_path):
    fn = tmp_path/'m.safetensors'
    with pytest.raises(ValueError, match='the network holds.*lambda'): save_model(_odd(learner(3)), fn)
    assert not fn.exists() and not list(tmp_path.glob('.part*'))

@pytest.mark.parametrize('fast', [True,False])
@pytest.mark.parametrize('ndim', [3,2])
def test_a_network_of_ones_own(loaders, scan, tmp_path, ndim, fast):
    "Weights and recipe are kept; whoever opens the file says how the network is built, in any of three ways"
    fn = tmp_path/'m.safetensors'
    torch.manual_seed(0)
    learn = (unet3d_learner if ndim==3 else unet2d_learner)(loaders[ndim], arch=OwnNet, nf=5, fast=fast, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    with pytest.warns(UserWarning, match=r'OwnNet is not a network with a known name.*load_model\(fn, arch=make\)'):
        save_model(learn, fn, post='keep_largest')
    with pytest.raises(ValueError,
                       match=r'm.safetensors: its network, test_ship.OwnNet, has no known name.*Use load_model\(fn, '
                             r'arch=make\)'):
        load_model(fn, 'cpu')
    net = OwnNet(learn.dls.train.one_batch()[0].shape[1], 3, ndim, 5)
    for arch in (OwnNet, lambda: deepcopy(net), net):
        back = load_model(fn, 'cpu', arch=arch)
        (m,p),(m2,p2) = learn.predict_volume(scan, proba=True, tta=True),back.predict_volume(scan, proba=True, tta=True,
                post=())
        assert same_bits(m, m2) and same_bits(p, p2) and back.post==('keep_largest',) and len(np.unique(m))>1
    again = load_model(save_model(back, tmp_path/'again.safetensors'), 'cpu', arch=OwnNet)
    assert same_bits(p, again.predict_volume(scan, proba=True, tta=True, post=())[1])
    both = Ensemble([fn, fn], device='cpu', arch=OwnNet)
    both.save_model(tmp_path/'e.safetensors')
    assert same_bits(load_model(tmp_path/'e.safetensors', 'cpu', arch=OwnNet).predict_volume(scan),
                                both.predict_volume(scan))
    with pytest.raises(ValueError, match='arch=make'): Ensemble([fn])
    with pytest.raises(ValueError, match='arch=make'): load_model(tmp_path/'e.safetensors')

def test_another_network_than_the_one_that_was_saved(loaders, tmp_path):
    fn = save_model(unet3d_learner(loaders[3], arch=OwnNet, nf=5), tmp_path/'m.safetensors')
    class Other(OwnNet):
        def forward(self, x): return super().forward(x)*2
    for arch,match in ((lambda: OwnNet(1, 3, 3, 6), 'do not fit the network'),
            (lambda: Other(1, 3, 3, 5), 'Give the arch'), (lambda: 7, 'torch.nn.Module; found int'),
            ('UNet', 'expected a function'), (lambda: 1/0, 'division by zero')):
        with pytest.raises(FastmedError, match=match): load_model(fn, 'cpu', arch=arch)

def test_a_learner_made_by_hand(loaders, scan, tmp_path):
    learn = VolumeLearner(loaders[3], UNet(1, 3, nf=4, depth=2), loss_func=DiceCELoss(), path=tmp_path)
    fn = save_model(learn, tmp_path/'m.safetensors')
    with pytest.raises(ValueError, match='fastmed.models.unet.UNet.*arch=make'): load_model(fn, 'cpu')
    assert same_bits(load_model(fn, 'cpu', arch=lambda: UNet(1, 3, nf=4, depth=2)).predict_volume(scan, proba=True)[1],
                                learn.predict_volume(scan, proba=True)[1])

def _odd(learn):
    learn.arch_args['norm'] = ('instance', lambda: 1)
    return learn

def test_a_network_that_was_changed(learner, tmp_path):
    fn = tmp_path/'m.safetensors'
    def act(l): l.model.encoder[0][2] = nn.Tanh()
    def head(l): l.model.heads[0] = nn.Conv3d(4, 3, 3, padding=1)
    def hook(l): l.model.register_forward_hook(lambda m,a,o: o*1.5)
    def half(l): l.model.bfloat16()
    def stride(l): l.arch_args['nf'] = 8
    for change in (act, head, hook, half, stride):
        learn = learner(3)
        change(learn)
        with pytest.raises(ValueError, match='changed after the Learner was made'): save_model(learn, fn)
    learn = learner(3)
    nn.init.constant_(learn.model.heads[0].bias, float('nan'))
    with pytest.raises(ValueError, match='NaN'): save_model(learn, fn)
    for post in (lambda m: m, ['keep_largest', 'nonsense']):
        with pytest.raises(ValueError, match='by name'): save_model(learner(3), fn, post=post)
    assert not fn.exists() and not list(tmp_path.glob('.part*'))

def test_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    learn,fn = saved
    was = fn.read_bytes()
    def full(self, b):
        open(self, 'wb').write(b[:len(b)//2])
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(type(fn), 'write_bytes', full)
    with pytest.raises(OSError, match='disk is full'): save_model(learn, fn)
    assert fn.read_bytes()==was and not list(tmp_path.glob('.part*'))

# ---- what is not opened

def refused(b, fn, match=None):
    fn.write_bytes(bytes(b))
    with pytest.raises(ValueError, match=match) as e: load_model(fn, 'cpu')
    assert str(fn) in str(e.value) and len(str(e.value))<2000
    return str(e.value)

def test_any_changed_byte(saved, tmp_path):
    "Every byte of the header, and 400 of the weights"
    b = saved[1].read_bytes()
    n = 8+int.from_bytes(b[:8], 'little')
    rng = np.random.default_rng(0)
    for i in [*range(n), *rng.integers(n, len(b), 400)]:
        bad = bytearray(b)
        bad[i] ^= 1<<int(rng.integers(8))
        refused(bad, tmp_path/'bad')

def test_cut_off_longer_and_foreign(saved, learner, tmp_path):
    from safetensors.torch import save
    b,fn = saved[1].read_bytes(),tmp_path/'bad'
    for n in (0, 1, 7, 8, 9, 100, len(b)//2, len(b)-1): refused(b[:n], fn)
    assert 'cut off' in refused(b[:-10], fn) and 'longer' in refused(b+b'x', fn)
    refused(save({'a':torch.zeros(3)}), fn, 'without its metadata')
    refused(save({'a':torch.zeros(3)}, {'format':'pt'}), fn, 'without its metadata')
    for junk in (b'\x93NUMPY', b'{}', b'\xff'*100, (2**63).to_bytes(8, 'little')+b'{}',
                 (10).to_bytes(8, 'little')+b'{"a":1234}', (2).to_bytes(8, 'little')+b'[]',
                 (100_000).to_bytes(8, 'little')+b'['*100_000):
        refused(junk, fn)
    learn = learner(3)
    learn.export('e.pkl')
    learn.save('w')
    refused((tmp_path/'e.pkl').read_bytes(), fn, 'load_learner')
    refused(pickle.dumps(dict(a=1)), fn, 'load_learner')
    for f in ('none.safetensors', '.'):
        with pytest.raises(OSError): load_model(tmp_path/f)

def forge(b, edit=lambda m: m, tensors=lambda t: t):
    "The file as one would write it who knows how: other contents, and a sum that is right"
    from safetensors.torch import load, save
    n = int.from_bytes(b[:8], 'little')
    meta = json.loads(json.loads(b[8:8+n])['__metadata__']['fastmed'])
    t = tensors(load(b))
    meta['sha256'] = modelformat.NO_DIGEST
    meta = edit(meta) or meta
    return modelformat.with_sha256(save(t, {'fastmed':meta if isinstance(meta, str) else json.dumps(meta)}))

def put(value, *keys):
    def f(m):
        o = m
        for k in keys[:-1]: o = o[k]
        o[keys[-1]] = value
    return f

def test_forgery_is_a_fair_test(saved, scan, tmp_path):
    (tmp_path/'same').write_bytes(forge(saved[1].read_bytes()))
    assert same_bits(load_model(tmp_path/'same', 'cpu').predict_volume(scan), saved[0].predict_volume(scan))

def infinite(*keys):
    "A number that JSON writes in digits and Python reads as infinity"
    def f(m):
        put('@', *keys)(m)
        return json.dumps(m).replace('"@"', '1e999')
    return f

def ct_stats(stats): return lambda m: m['preprocess'].update(normalize='ct', stats=stats)

ARGS = ('network','args','dict')
FORGED = dict(
    newer=(put(4, 'format'), 'newer fastmed'),
        unknown=(put('os.system', 'network', 'arch'), "expected a network among.*'os.system'"),
        private=(put('ResNet', 'network', 'arch'), 'expected a network among'),
    list_arch=(put(['UNet'], 'network', 'arch'), 'expected a network among'),
        act=(put('os.system', *ARGS, 'act'), 'expected act'),
        act2=(put('torch.nn.modules.activation.Module', *ARGS, 'act'), 'expected act'),
    argument=(put(1, *ARGS, 'evil'), "no argument 'evil'"), deep=(put(10**9, *ARGS, 'depth'), 'numbers up to'),
        wide=(put(9_000, *ARGS, 'nf'), 'larger than its weights'), levels=(put(9_999, *ARGS, 'depth'), None),
        wide2=(put(10**30, *ARGS, 'nf'), 'numbers up to'),
    convs=(put(9_999, *ARGS, 'convs'), 'modules'), negative=(put(-1, *ARGS, 'nf'), 'nf'),
        text=(put('8', *ARGS, 'nf'), 'nf'), kernels=(put({'tuple':[9_999]*2}, *ARGS, 'kernels'), None),
    other=(put(8, *ARGS, 'nf'), 'do not fit the network'), outputs=(put(7, 'network', 'n_out'), 'one a code'),
        inputs=(put(3, 'network', 'n_in'), 'do not fit'), no_ndim=(put(5, 'plan', 'dict', 'ndim'), 'plan of slices'),
    patch=(put({'tuple':[10**6]*3}, 'plan', 'dict', 'patch'), 'numbers up to'),
        patch2=(put({'tuple':[9_000]*3}, 'plan', 'dict', 'patch'), 'voxels'),
        patch3=(put({'tuple':[0,0,0]}, 'plan', 'dict', 'patch'), None),
        post=(put(['os.system'], 'post'), 'post-processing'),
    field=(put(1, 'preprocess', 'evil'), 'unknown fields'), normalize=(put('evil', 'preprocess', 'normalize'),
        'normalize'), drift=(lambda m: put([o*1.01+.01 for o in m['echo']], 'echo')(m), 'gives other logits'),
        nothing=(lambda m: '{}', 'format and a checksum'),
    nested=(lambda m: '['*100_000, 'JSON'), no_dict=(lambda m: json.dumps([m['sha256']]), 'format and a checksum'),
        no_sum=(put('', 'sha256'), None),
    infinite_echo=(infinite('echo', 0), 'JSON'), infinite_share=(infinite('foreground'), 'JSON'),
    infinite_spacing=(infinite('preprocess', 'spacing', 0), 'JSON'),
    spacing=(put([1e300]*3, 'preprocess', 'spacing'), 'spacing: expected three sizes'),
    orientation=(put('XYZ', 'preprocess', 'orientation'), "orientation: expected an order of axes such as 'RAS'"),
    orientation2=(put('RRR', 'preprocess', 'orientation'), 'orientation: expected'),
    orientation3=(put(7, 'preprocess', 'orientation'), 'orientation: expected'),
    stats=(ct_stats([{}]), 'stats: expected'),
    stats2=(ct_stats([dict(lo=0, hi=1, mean=.5, std=-1)]), 'stats: expected'),
    stats3=(ct_stats(None), 'not fitted'), stats4=(ct_stats('abc'), 'stats: expected'),
    auto=(put('auto', 'preprocess', 'spacing'), 'not fitted'),
    channels=(put(['zscore']*9, 'preprocess', 'normalize'), '9 normalisations'),
    half=(put({'tuple':[16.5,16,16]}, 'plan', 'dict', 'patch'), 'plan of slices or volumes'),
    escape=(put(['background','\x1b[2J','b'], 'preprocess', 'codes'), 'control characters'))

@pytest.mark.parametrize('what', FORGED)
def test_forged_metadata(saved, tmp_path, what):
    "A right sum does not make a file right, nor give it more than its weights' memory"
    import resource
    edit,match = FORGED[what]
    b = saved[1].read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try: bad = forge(b, edit)
    except ValueError:
        assert what in ('nothing','nested','no_sum')
        bad = _unsealed(b, edit)
    refused(bad, tmp_path/'bad', match)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before<600_000

@pytest.mark.parametrize('axis', [7, -1, None])
def test_forged_slices(learner, tmp_path, axis):
    b = save_model(learner(2), tmp_path/'m.safetensors').read_bytes()
    refused(forge(b, put(axis, 'plan', 'dict', 'axis')), tmp_path/'bad', 'plan of slices or volumes')

def test_little_told_of_the_training_is_enough(saved, tmp_path):
    (tmp_path/'m').write_bytes(forge(saved[1].read_bytes(), put({'seen':None, 'torch':'2'}, 'training')))
    assert 'trained on ? cases of ? subjects' in repr(load_model(tmp_path/'m', 'cpu'))

def _peak(code, *args):
    "Peak memory of a fresh process that runs `code`, in MB, and what it printed"
    peak = 'resource.getrusage(resource.RUSAGE_SELF).ru_maxrss'
    code = f"""import resource, sys
from fastmed.learn.ensemble import load_model
from fastmed.core import FastmedError
base = {peak}
{code}
print(({peak}-base)/1024)"""
    *said,mb = python(code, *args).splitlines()
    return float(mb),said

LOADS = "try: load_model(sys.argv[2], 'cpu'); print('opened')\nexcept FastmedError as e: print(str(e)[:300])"

def _tiny(loaders, tmp_path, **kwargs):
    l = unet3d_learner(loaders[3], nf=1, depth=1, path=tmp_path, fast=False, **kwargs)
    return save_model(l, tmp_path/'tiny.safetensors').read_bytes()

def test_a_short_file_cannot_take_gigabytes_to_try(loaders, tmp_path):
    "A megabyte that names a network of 9,000 channels, whose trial would take ten gigabytes"
    net = dict(n_in=9_000, nf=1, depth=6)
    new = {k:v.contiguous() for k,v in UNet(n_out=3, **net).state_dict().items()}
    fn = tmp_path/'forged.safetensors'
    def edit(m):
        m['network'].update(n_in=9_000, args={'dict':dict(nf=1, depth=6)}, patch={'tuple':[64]*3})
        m['plan']['dict']['patch'] = {'tuple':[64]*3}
    fn.write_bytes(forge(_tiny(loaders, tmp_path), edit, lambda t: new))
    mb,said = _peak(LOADS, tmp_path, fn)
    assert fn.stat().st_size<2e6 and 'takes more memory than is allowed' in said[0] and mb<1000, (mb, said)
    # nothing to hold the answers against
    b = forge(_tiny(loaders, tmp_path), lambda m: (edit(m), m.update(echo=[]))[0], lambda t: new)
    assert 'takes more memory than is allowed' in refused(b, fn)
    assert 'takes more memory than is allowed' in refused(forge(b, put(2, 'format')), fn)

def test_a_short_file_cannot_build_for_ever(loaders, tmp_path):
    fn = tmp_path/'forged.safetensors'
    def edit(m):
        m['network'].update(arch='monai.UNet', args={'dict':dict(channels=[1]*10, strides=[1]*9, num_res_units=9_999)})
    b = forge(_tiny(loaders, tmp_path), edit)
    assert len(b)<45_000
    # not the 30,000 that are the most of any network
    assert 'modules' in refused(b, fn, r'more than [\d]{3,4} modules|more than [1-2],\d\d\d modules')

ODD = (None, True, -1, 0, 1, 7, 999, 9_999, 10_000, 1e308, float('nan'), float('inf'), 2**70, '', 'x', [], {}, [[]],
       [1]*50, [9_999]*3, {'tuple':[9_999]*3}, {'tuple':[2]*20}, {'dict':{}}, {'tuple':1}, {'a':1,'b':2}, .5, 1e-300,
       'UNet', 'SwinUNETR', 'resnet18', 'instance')
KNOWN = ('nf','depth','convs','kernels','channels','strides','num_res_units','norm','act','dropout','filters',
         'init_filters','window_size')

def _odd_value(rng, o):
    "The same with a value somewhere replaced, dropped or added"
    odd = ODD[rng.integers(len(ODD))]
    if isinstance(o, dict) and o and rng.random()<.9:
        k = sorted(o)[rng.integers(len(o))]
        how = rng.random()
        if how<.1: return {a:b for a,b in o.items() if a!=k}
        if how<.3: return {**o, KNOWN[rng.integers(len(KNOWN))]:odd}
        return {**o, k:_odd_value(rng, o[k])}
    if isinstance(o, list) and o and rng.random()<.8:
        i = int(rng.integers(len(o)))
        return [*o[:i], _odd_value(rng, o[i]), *o[i+1:]]
    return odd

def _forged(rng, b):
    "A model file with another header, sealed as one would who knows how"
    n = int.from_bytes(b[:8], 'little')
    head = json.loads(b[8:8+n])
    meta = json.loads(head.pop('__metadata__')['fastmed'])
    meta.pop('sha256')
    if rng.random()<.15: head = _odd_value(rng, head)
    for _ in range(int(rng.integers(1, 4))):
        if rng.random()<.6 and isinstance(meta, dict) and isinstance(meta.get('network'), dict):
            meta['network'] = _odd_value(rng, meta['network'])
        else: meta = _odd_value(rng, meta)
    if isinstance(meta, dict) and rng.random()<.3: meta['echo'] = []
    head = {'__metadata__':{'fastmed':json.dumps({'sha256':modelformat.NO_DIGEST, **meta} if isinstance(meta, dict)
            else meta)}, **(head if isinstance(head, dict) else {'x':head})}
    h = json.dumps(head).encode()
    b = len(h).to_bytes(8, 'little')+h+b[8+n:]
    return modelformat.with_sha256(b) if modelformat.NO_DIGEST.encode() in b else b

def test_some_hundred_forged_headers(loaders, tmp_path):
    "In a child process with a limit of memory and of time a file: each is opened or refused by name, in little memory"
    rng,base = np.random.default_rng(0),[]
    for ndim,arch,kw in ((3,'UNet',dict(nf=2, depth=2)), (2,'monai.UNet',dict(channels=(4,8), strides=(2,))),
            (3,'SegResNet',dict(init_filters=8))):
        learn = (unet3d_learner if ndim==3 else unet2d_learner)(loaders[ndim], arch=arch, fast=False, path=tmp_path,
                                                                **kw)
        base.append(save_bytes(learn, tmp_path))
    for i in range(300): (tmp_path/f'bad{i:03}').write_bytes(_forged(rng, base[i%3]))
    out = python("""
import json, resource, signal, sys, warnings
from fastmed.all import *
warnings.simplefilter('ignore')
res,tmp = {},Path(sys.argv[1])
class Slow(BaseException): pass
def slow(*args): raise Slow
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024
signal.signal(signal.SIGALRM, slow)
load_model(tmp/'s.safetensors', 'cpu')
import monai.networks.nets
now = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now+3*2**30, now+3*2**30))
was = peak()
for f in sorted(tmp.glob('bad*')):
    signal.alarm(120)
    try:
        load_model(f, 'cpu')
        said = 'opened'
    except FastmedError as e: said = 'refused' if f.name in str(e) and len(str(e))<2000 else f'says {e}'
    except Slow: said = 'takes for ever'
    except Exception as e: said = f'{type(e).__name__}: {e}'
    signal.alarm(0)
    mb,was = peak()-was,peak()
    res[f.name] = said if mb<700 else f'{said}, and took {mb} MB'
print(json.dumps(res))
""", tmp_path)
    res = json.loads(out.splitlines()[-1])
    odd = {k:v for k,v in res.items() if v not in ('opened','refused')}
    assert len(res)==300 and not odd, odd
    assert list(res.values()).count('refused')>200

def test_zeros_that_a_right_header_declares(saved, tmp_path, monkeypatch):
    "They take no room on the disk: they are read a piece at a time, and refused before a network is built of them"
    b = saved[1].read_bytes()
    n = int.from_bytes(b[:8], 'little')
    head = json.loads(b[8:8+n])
    size = 2**28
    meta = json.loads(head['__metadata__']['fastmed'])
    meta['network']['args']['dict']['nf'] = 4_000
    head = {'__metadata__':{'fastmed':json.dumps({**meta, 'sha256':modelformat.NO_DIGEST})},
            'w':dict(dtype='F32', shape=[size//4], data_offsets=[0,size])}
    h = json.dumps(head).encode()
    start = len(h).to_bytes(8, 'little')+h
    digest = hashlib.sha256(start)
    for _ in range(size//2**20): digest.update(bytes(2**20))
    with open(tmp_path/'zeros', 'wb') as f:
        f.write(start.replace(modelformat.NO_DIGEST.encode(), f'sha256:{digest.hexdigest()}'.encode()))
        f.truncate(len(start)+size)
    monkeypatch.setattr(modelfile, 'memory_left', lambda *a: 2**28)
    with pytest.raises(MemoryError, match='zeros: its weights need 0.537 GB'): load_model(tmp_path/'zeros', 'cpu')
    monkeypatch.undo()
    mb,said = _peak(LOADS, tmp_path, tmp_path/'zeros')
    assert mb<700 and 'zeros' in said[0], (mb, said)

def test_what_is_no_model_is_not_read(tmp_path, monkeypatch):
    "Five gigabytes of zeros, which take no room on the disk"
    fn = tmp_path/'zeros.safetensors'
    with open(fn, 'wb') as f: f.truncate(5*10**9)
    monkeypatch.setattr(Path, 'read_bytes', lambda self: pytest.fail('the whole file is read'))
    with pytest.raises(ValueError, match='expected a safetensors file'): load_model(fn, 'cpu')
    with open(fn, 'r+b') as f: f.write((10**9).to_bytes(8, 'little')+b'{')
    with pytest.raises(ValueError, match='expected a safetensors file'): load_model(fn, 'cpu')

def test_an_onnx_file_of_gigabytes_is_not_read(tmp_path, monkeypatch):
    "ONNX files have less than two"
    with open(tmp_path/'zeros.onnx', 'wb') as f: f.truncate(5*10**9)
    monkeypatch.setattr(Path, 'read_bytes', lambda self: pytest.fail('the whole file is read'))
    with pytest.raises(ValueError, match='zeros.onnx: expected a file of export_onnx; found 5,000,000,000 bytes'):
        load_onnx(tmp_path/'zeros.onnx')

@pytest.mark.parametrize('error', [ZeroDivisionError('division by zero'), np.linalg.LinAlgError('SVD did not converge'),
        AssertionError('x'), RecursionError('deep')])
def test_an_error_of_the_network_itself_names_the_file(saved, monkeypatch, error):
    "Whatever a network makes of arguments that somebody made up"
    def fails(*args): raise error
    monkeypatch.setattr(modelfile, '_build', fails)
    with pytest.raises(FastmedError, match='m.safetensors: not a model that can be opened'): load_model(saved[1], 'cpu')

def _unsealed(b, edit):
    from safetensors.torch import load, save
    n = int.from_bytes(b[:8], 'little')
    meta = json.loads(json.loads(b[8:8+n])['__metadata__']['fastmed'])
    meta = edit(meta) or meta
    return save(load(b), {'fastmed':meta if isinstance(meta, str) else json.dumps(meta)})

@pytest.mark.parametrize('key', ('network','plan','preprocess','columns','foreground','seed','flips','post','training',
                                 'echo','format','sha256'))
@pytest.mark.parametrize('value', ('gone', None, 7, 'x', [], {}, [[1]]))
def test_missing_or_odd_metadata(saved, tmp_path, key, value):
    b = saved[1].read_bytes()
    def edit(m):
        if value=='gone': m.pop(key)
        else: m[key] = value
    fair = dict(foreground=(7,), seed=(7,), post=([],{}), flips=([],{}))            # these are fair values
    if value!='gone' and value in fair.get(key, ()): return
    bad = forge(b, edit) if key!='sha256' else _unsealed(b, edit)
    refused(bad, tmp_path/'bad')

def test_tensors_missing_too_many_or_otherwise(saved, tmp_path):
    b,fn = saved[1].read_bytes(),tmp_path/'bad'
    refused(forge(b, tensors=lambda t: {k:v for k,v in t.items() if k!='heads.0.weight'}), fn,
            'heads.0.weight.*nothing found')
    refused(forge(b, tensors=lambda t: {**t, 'extra':torch.zeros(2)}), fn, 'extra: no such tensor expected')
    refused(forge(b, tensors=lambda t: {**t, 'heads.0.weight':t['heads.0.weight'].half()}), fn, 'float16')
    refused(forge(b, tensors=lambda t: {}), fn, 'do not fit|larger')
    refused(forge(b, tensors=lambda t: {**t, 'heads.0.weight':t['heads.0.weight']*1.1}), fn, 'gives other logits')

def test_pretrained_fetches_nothing(loaders, tmp_path, monkeypatch):
    learn = unet2d_learner(loaders[2], 'SegResNet', init_filters=8, path=tmp_path)
    b = save_model(learn, tmp_path/'m.safetensors').read_bytes()
    import socket
    import urllib.request
    def never(*a, **k): raise AssertionError('fetched')
    monkeypatch.setattr(urllib.request, 'urlopen', never)
    monkeypatch.setattr(socket, 'socket', never)
    (tmp_path/'p').write_bytes(forge(b, put(True, *ARGS, 'pretrained')))
    load_model(tmp_path/'p', 'cpu')
    def flex(m):
        m['network'].update(arch='FlexibleUNet', args={'dict':{'pretrained':True, 'backbone':'efficientnet-b0'}})
    refused(forge(b, flex), tmp_path/'bad', 'do not fit|larger')

# ---- ONNX

@pytest.fixture
def onnx():
    for o in ('onnx','onnxscript','onnxruntime'): pytest.importorskip(o)

@pytest.mark.parametrize('ndim,kw', [(3,{}), (2,{}), (3,dict(arch='SegResNet', init_filters=8)),
        (3,dict(deep_supervision=True, depth=3, nf=4, arch='UNet')), (2,dict(arch='resnet18', pretrained=False))])
def test_onnx_answers_alike(onnx, learner, loaders, scan, tmp_path, ndim, kw):
    make = unet3d_learner if ndim==3 else unet2d_learner
    learn = make(loaders[ndim], fast=False, path=tmp_path, **kw) if kw else learner(ndim, fast=False)
    back = load_onnx(export_onnx(learn, tmp_path/'m.onnx', post='keep_largest'))
    (m,p),(m2,p2) = learn.predict_volume(scan, proba=True, tta=True, post='keep_largest'),back.predict_volume(scan,
                                         proba=True, tta=True)
    assert (p-p2).abs().max()<4e-3 and (m!=m2).float().mean()<1e-3 and np.array_equal(m.affine, m2.affine)
    assert back.post==('keep_largest',) and not list(tmp_path.glob('.part*'))

def test_onnx_of_a_fast_learner_is_its_float32_network(onnx, learner, scan, tmp_path):
    fast,plain = learner(3),learner(3, fast=False)
    p,p2 = plain.predict_volume(scan,
            proba=True)[1],load_onnx(export_onnx(fast, tmp_path/'m.onnx')).predict_volume(scan, proba=True)[1]
    assert (p-p2).abs().max()<4e-3

def test_onnx_refuses(onnx, learner, loaders, scan, tmp_path):
    fn,bad = tmp_path/'m.onnx',tmp_path/'bad.onnx'
    export_onnx(learner(2, fast=False), fn)
    b = fn.read_bytes()
    rng = np.random.default_rng(0)
    for i in rng.integers(0, len(b), 300):
        c = bytearray(b)
        c[i] ^= 1<<int(rng.integers(8))
        bad.write_bytes(c)
        with pytest.raises(ValueError, match='bad.onnx'): load_onnx(bad)
    for c in (b'', b[:100], b[:-1], b+b'x', save_bytes(learner(3), tmp_path)):
        bad.write_bytes(c)
        with pytest.raises(ValueError, match='bad.onnx'): load_onnx(bad)
    with pytest.raises(ValueError): load_model(fn)
    with pytest.raises(ValueError, match='known name'):
        export_onnx(unet3d_learner(loaders[3], arch=Own), tmp_path/'own.onnx')
    with pytest.raises(ValueError, match='changed after'): save_model(load_onnx(fn), tmp_path/'m.safetensors')
    with pytest.raises(FileNotFoundError): load_onnx(tmp_path/'none.onnx')

def test_onnx_forged(onnx, learner, tmp_path):
    import onnx as ox
    export_onnx(learner(2, fast=False), tmp_path/'m.onnx')
    m = ox.load(str(tmp_path/'m.onnx'))
    meta = json.loads(m.metadata_props[0].value)
    def write(edit, mod=lambda m: m):
        d = json.loads(json.dumps(meta))
        d['sha256'] = modelformat.NO_DIGEST
        edit(d)
        c = ox.ModelProto()
        c.CopyFrom(m)
        mod(c)
        ox.helper.set_model_props(c, {'fastmed':json.dumps(d)})
        (tmp_path/'bad.onnx').write_bytes(modelformat.with_sha256(c.SerializeToString()))
        return tmp_path/'bad.onnx'
    load_onnx(write(lambda d: None))
    def other(c): c.graph.node[0].op_type = 'Nothing'
    for edit,mod in ((put(plain.FORMAT_VERSION+1, 'format'), lambda c: c), (put([8,8], 'window'), lambda c: c),
            (put(2, 'network', 'n_in'), lambda c: c), (put([1.]*64, 'echo'), lambda c: c), (lambda d: None, other)):
        with pytest.raises(ValueError, match='bad.onnx'): load_onnx(write(edit, mod))

def save_bytes(learn, tmp): return save_model(learn, tmp/'s.safetensors').read_bytes()

def test_onnx_says_what_it_needs(learner, tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(ImportError, match=r'fastmed\[onnx\]'): export_onnx(learner(3), tmp_path/'m.onnx')
