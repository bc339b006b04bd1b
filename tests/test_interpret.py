"""Numbers against scikit-learn and by hand, Grad-CAM against planted evidence and another way to reckon it, interpret()
on every kind of Learner."""
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as skm
import torch
import torch.nn.functional as F
from fastai.vision.all import ClassificationInterpretation, Interpretation, load_learner, vision_learner
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import affine_of
from PIL import Image
from torch import nn

from fastmed.all import InputError, SliceDataLoaders, TensorVolume, VolumeDataLoaders, set_seed, unet3d_learner
from fastmed.core import ArgumentError, ColumnError
from fastmed.data.datasets import sphere
from fastmed.data.radiographs import RadiographDataLoaders
from fastmed.learn.classify import classifier_learner
from fastmed.metrics.curves import *
from fastmed.metrics.scores import (
    ap_stat,
    area_difference,
    area_under,
    auc_stat,
    balanced_accuracy,
    choose_point,
    label_scores,
    mean_abs_error,
    r_squared,
    roc_auc,
)
from fastmed.metrics.stats import *
from fastmed.study.gradcam import *
from fastmed.study.interpret import *


@pytest.fixture(autouse=True, scope='module')
def quiet():
    import fastprogress.fastprogress as fp
    was = fp.NO_BAR
    fp.NO_BAR = True
    yield
    fp.NO_BAR = was

# ---- numbers

cases = st.lists(st.tuples(st.integers(0,1), st.integers(0,6), st.integers(0,3)), min_size=2, max_size=40)

@settings(max_examples=30, deadline=None)
@given(cases)
def test_areas_equal_scikit_learn(rows):
    "With ties, and with any weights"
    y,s,w = map(np.array, zip(*rows))
    w = w.astype(float)
    if y.min()==y.max():
        assert np.isnan(area_under(pred=s, targ=y, n_boot=2))
        return
    assert area_under(pred=s, targ=y, n_boot=2)==pytest.approx(skm.roc_auc_score(y, s))
    assert area_under(pred=s, targ=y, kind='pr', n_boot=2)==pytest.approx(skm.average_precision_score(y, s))
    if w[y==1].sum() and w[y==0].sum():
        assert auc_stat(y, s)(w[None])[0]==pytest.approx(skm.roc_auc_score(y, s, sample_weight=w))
        assert ap_stat(y, s)(w[None])[0]==pytest.approx(skm.average_precision_score(y, s, sample_weight=w))

@settings(max_examples=30, deadline=None)
@given(cases, st.integers(1,12))
def test_calibration_by_hand(rows, bins):
    y,s,_ = map(np.array, zip(*rows))
    p = s/6
    c = calibration(pred=p, targ=y, bins=bins, n_boot=2)
    e = np.linspace(0, 1, bins+1)
    total = 0
    for i in range(bins):
        m = (p>=e[i]) & ((p<e[i+1]) if i<bins-1 else (p<=1))
        assert c.table.n[i]==m.sum()
        if m.any(): total += m.sum()/len(p)*abs(p[m].mean()-y[m].mean())
    assert c.ece==pytest.approx(total) and c.brier==pytest.approx(((p-y)**2).mean())

def test_band_holds_the_curve_and_follows_subjects():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 80)
    s = y+rng.normal(size=80)
    for kind in ('roc','pr'):
        c = score_curve(pred=s, targ=y, kind=kind, n_boot=300)
        at = np.interp(c.grid, c.x, c.y) if kind=='roc' else None
        if kind=='roc': assert ((c.low-1e-9<=at) & (at<=c.high+1e-9)).mean()>.95
        assert (c.low<=c.high+1e-12).all() and c.area.low<c.area<c.area.high
        # the same subject twice says nothing new
        twice = score_curve(pred=np.tile(s, 2), targ=np.tile(y, 2), groups=np.tile(np.arange(80), 2), kind=kind,
                            n_boot=300)
        assert np.allclose(c.low, twice.low) and np.allclose(c.high,
                                                             twice.high) and c.area.low==pytest.approx(twice.area.low)
        # taken for new cases the band shrinks
        loose = score_curve(pred=np.tile(s, 2), targ=np.tile(y, 2), groups=None, kind=kind, n_boot=300)
        assert (loose.high-loose.low).mean()<.85*(c.high-c.low).mean()

def test_operating_point_counts():
    y,s = np.array([1,1,1,0,0,0,0,1]),np.array([.9,.8,.5,.5,.4,.2,.1,.05])
    o = operating_point(pred=s, targ=y, rule=.5)
    assert (o.sensitivity,o.specificity,o.ppv,o.npv)==pytest.approx((3/4,3/4,3/4,3/4)) and o.n==8 and o.positives==4
    none = operating_point(pred=[.1,.2], targ=[0,0])
    assert np.isnan(none.sensitivity) and none.specificity==1
    assert '[' in str(o.sensitivity) and str(o.sensitivity).startswith('0.750')

@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0,1), st.integers(0,5), st.sampled_from('abc')), min_size=4, max_size=50))
def test_confounding_splits_the_area(rows):
    "Pooled AUC is the mean of within and between, weighted by pairs; a brute count agrees"
    y,s,z = map(np.array, zip(*rows))
    if y.min()==y.max(): return
    c = confounding(pred=s, targ=y, confounder=z, n_boot=3)
    a = c.areas
    pairs = [(s[i]>s[j])+.5*(s[i]==s[j]) for i in range(len(y)) for j in range(len(y)) if y[i]>y[j] and z[i]==z[j]]
    assert a.pairs['within levels']==len(pairs) and a.pairs['pooled']==y.sum()*(1-y).sum()
    if pairs: assert a.auc['within levels']==pytest.approx(np.mean(pairs))
    else: assert np.isnan(a.auc['within levels'])
    assert np.nansum((a.auc*a.pairs)[['within levels','between levels']])==pytest.approx(a.auc['pooled']
            *a.pairs['pooled'])
    assert c.counts.values.sum()==len(y) and .5<=a.auc['confounder alone']<=1
    for _k,r in c.within.iterrows():
        assert np.isnan(r.auc)==(r.positive in (0,r.n)) and (not np.isnan(r.auc) or 'only' in r.note)

def test_subgroups_keep_the_small_and_the_missing():
    y = np.array([1,0,1,0,1,1])
    s = np.linspace(0, 1, 6)
    t = score_by(bands([1.,2.,30.,40.,None,50.], [20]), pred=s, targ=y, groups=list('aabbcc'), n_boot=20)
    assert list(t.index)==['<20','≥20','(missing)',
            'all'] and t.loc['(missing)'].n==1 and np.isnan(t.loc['(missing)'].auc) and 'only' in t.loc[
            '(missing)'].note
    assert t.loc['all'].n==6 and t.loc['all'].subjects==3 and t.n[:-1].sum()==6
    e = error_by(['x','x','y'], pred=[1.,3,3], targ=[1.,2,3])
    assert e.loc['x'].mae==.5 and e.loc['x'].bias==.5 and e.loc['y'].mae==0 and 'few' in e.loc['y'].note
    assert [str(o) for o in bands(np.arange(100), 4).categories]==['<24.75','24.75–<49.5','49.5–<74.25',
            '≥74.25'] and list(bands([True,False]).categories)==['False','True']

def test_agreement_equals_scikit_learn():
    rng = np.random.default_rng(0)
    y = rng.normal(50, 10, 60)
    p = y+rng.normal(2, 5, 60)
    a = agreement(pred=p, targ=y)
    assert a.mae==pytest.approx(skm.mean_absolute_error(y, p)) and a.r2==pytest.approx(skm.r2_score(y,
            p)) and a.rmse==pytest.approx(skm.root_mean_squared_error(y, p))
    assert a.limit_high==pytest.approx((p-y).mean()+1.96*(p-y).std(ddof=1)) and a.mae.low<a.mae<a.mae.high and np.isnan(
            agreement(pred=[1.,2], targ=[1.,1]).r2)

def test_wrong_input_is_named():
    for f,e in ((lambda: area_under(pred=[.1,.2], targ=[0,2]),'0 or 1'),
            (lambda: area_under(pred=[.1], targ=[0,1]),'shapes'),
            (lambda: area_under(pred=[], targ=[]),'no cases'), (lambda: calibration(pred=[.1,1.2], targ=[0,1]),
                                                                'probabilities'),
                (lambda: area_under(pred=[.1,.2], targ=[0,1], groups=['a',None]),'no group'),
            (lambda: score_curve(pred=[.1,.2], targ=[1,1]),'both classes'),
             (lambda: calibration(pred=[.1,.2], targ=[0,1], bins=[.2,1]),
            'edges'), (lambda: estimate(lambda w: w[:,0], 1, level=2),'level'),
                (lambda: agreement(pred=[np.nan], targ=[1.]),'not finite'),
            (lambda: score_by(['a'], pred=[.1,.2], targ=[0,1]),'one level'),
            (lambda: CaseInterpretation([0,1], [[.1,.9]]),'fit'),
            (lambda: CaseInterpretation([0,1], [.1,.2], df=pd.DataFrame(dict(a=[1]))),'rows of df'),
                (lambda: CaseInterpretation([0,1], [.1,.2], ['a']),'names'),
            (lambda: CaseInterpretation(['x','y'], [.1,.2], ['a','y']),'none of the classes'),
            (lambda: CaseInterpretation([0,1], [.1,np.nan]),'not finite'),
            (lambda: CaseInterpretation([0,1], [.1,.2], point={'z':.5}),'none of')):
        with pytest.raises(InputError, match=e): f()
    with pytest.raises(ColumnError, match='there is no DataFrame'): CaseInterpretation([0,1], [.1,.2]).by('sex')

# ---- Grad-CAM

class Tiny(nn.Sequential):
    "A network without a norm, which has no way to spread a thing over all places"
    def __init__(self, n_in, n_out, ndim=2, nf=12):
        conv,pool = (getattr(nn, f'{o}{ndim}d') for o in ('Conv','AdaptiveAvgPool'))
        block = lambda i,s: (conv(i, nf, 3, s, 1), nn.LeakyReLU(.1, True))
        super().__init__(*block(n_in, 1), *block(nf, 2), *block(nf, 1), pool(1), nn.Flatten(), nn.Linear(nf, n_out))

def test_grad_cam_by_hand():
    """In-place activations behind the layer change nothing; each item for itself; frozen weights do no harm; the model
    is left as it was"""
    torch.manual_seed(0)
    m = Tiny(1, 3)
    x = torch.randn(2, 1, 16, 16)
    m.train()
    for p in m.parameters(): p.requires_grad_(False)
    before = {k:v.clone() for k,v in m.state_dict().items()}
    for layer,n in (('4',5), ('2',3), (None,6)):
        A = nn.Sequential(*[o if not isinstance(o, nn.LeakyReLU) else nn.LeakyReLU(.1)
                            for o in list(m)[:n]])(x).detach().requires_grad_()
        out = A
        for o in list(m)[n:]: out = F.leaky_relu(out, .1) if isinstance(o, nn.LeakyReLU) else o(out)
        g = torch.autograd.grad(out[:,2].sum(), A)[0]
        want = (A*g.mean((2,3), keepdim=True)).sum(1).relu().detach()
        got = grad_cam(m, x, 2, layer)
        small = got[:,::2,::2]
        assert torch.allclose(small, want/want.flatten(1).amax(1).clamp(min=1e-20)[:,None,None], atol=1e-5), layer
    assert m.training and all(torch.equal(before[k], v) for k,v in m.state_dict().items()) and not any(o._forward_hooks
            for o in m.modules())
    with torch.inference_mode(): assert torch.allclose(grad_cam(m, x, 2), got)
    assert torch.allclose(grad_cam(m, x[1], 2)[0], got[1], atol=1e-5)
    # what speaks for does not speak against
    one = Tiny(1, 1)
    assert float((grad_cam(one, x, 1)*grad_cam(one, x, 0))[:,::2,::2].abs().max())==0

@pytest.mark.parametrize('name', ['resnet18','densenet121','efficientnet_lite0','convnext_atto','regnetx_002',
                                  'mobilenetv3_small_050'])
def test_cam_layer_of_timm(name):
    import timm
    m = timm.create_model(name, num_classes=2, in_chans=1).eval()
    x = torch.randn(1,1,128,128)
    a = grad_cam(m, x)
    assert a.shape==(1,128,128) and torch.isfinite(a).all() and 0<=float(a.min())<=float(a.max())<=1

def test_cam_layer_of_monai():
    from monai.networks.nets import DenseNet, ViT, resnet10
    for m in (resnet10(spatial_dims=3, n_input_channels=1, num_classes=2, widen_factor=.25),
              DenseNet(3, 1, 2, init_features=8, growth_rate=4, block_config=(2,2))):
        a = grad_cam(m.eval(), torch.randn(1,1,32,32,32), 1)
        assert a.shape==(1,32,32,32) and torch.isfinite(a).all()
    v = ViT(1, (32,32,32), (16,16,16), hidden_size=48, mlp_dim=48, num_layers=1, num_heads=4, classification=True)
    class Label(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = v
        def forward(self, x): return self.v(x)[0]
    with pytest.raises(InputError, match='Label mixes positions by attention'):
        grad_cam(Label(), torch.randn(1,1,32,32,32))

def test_cam_of_a_network_with_masks_and_labels():
    "The label's evidence is sought at the end of the encoder; the decoder does not speak to it"
    from fastmed.all import UNet
    from fastmed.models.classifiers import MultiTaskNet
    torch.manual_seed(0)
    m = MultiTaskNet(UNet(1, 2, nf=4, depth=3, ndim=2), 3).eval()
    x = torch.randn(2,1,32,32)
    a = grad_cam(m, x, 1)
    assert a.shape==(2,32,32) and float(a.max())>.99 and torch.equal(a, grad_cam(m, x, 1, m.encoder[-1]))

@pytest.mark.parametrize('name,kw',
        [('vit_tiny_patch16_224',dict(depth=1)),
         ('swin_tiny_patch4_window7_224',dict(embed_dim=24, depths=(1,1), num_heads=(2,2)))])
def test_transformers_are_refused_by_name(name, kw):
    import timm
    m = timm.create_model(name, num_classes=2, in_chans=1, **kw)
    with pytest.raises(InputError, match=f'{type(m).__name__} mixes positions'): grad_cam(m, torch.randn(1,1,224,224))

def test_cam_lies_where_the_kernels_look():
    "A map that copies its input through stride 4 peaks where the input does, on average, and not two voxels off"
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Conv2d(1, 1, 3, 2, 1, bias=False) for _ in range(2)], nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        for c in net[:2]: c.weight.copy_(torch.tensor([[1.,2,1],[2,4,2],[1,2,1]])[None,None])
        net[-1].weight.copy_(torch.tensor([[-1.],[1.]]))
    off = []
    for i in range(12, 40):
        x = torch.zeros(1,1,48,48)
        x[0,0,i,i] = 1
        a = grad_cam(net, x, 1)[0]
        w = a/a.sum()
        off.append(float((w.sum(1)*torch.arange(48)).sum())-i)
    assert abs(np.mean(off))<.2

# ---- Learners

@pytest.fixture(scope='module')
def volumes(tmp_path_factory):
    "Volumes in three orders of axes; the ill have a bright ball at a random place"
    path = tmp_path_factory.mktemp('balls')
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        ill = i%2
        c = rng.integers(4, 14, 3)
        a = rng.normal(0, .4, (18,18,18))+2*ill*sphere((18,18,18), c, 4)
        nib.save(nib.Nifti1Image(a.astype(np.float32), affine_of(('RAS','LPI','PSR')[i%3], origin=(5,i,-3))),
                 path/f'v{i}.nii')
        rows.append(dict(image=f'v{i}.nii', subject=f's{i//2}', ball=['no','yes'][ill],
                         size=10.*ill+float(rng.normal()), site='ab'[i%3==0], centre=c, valid=i>=40))
    return path,pd.DataFrame(rows)

@pytest.fixture(scope='module')
def learn3(volumes, tmp_path_factory):
    path,df = volumes
    dls = VolumeDataLoaders.from_df(df.drop(columns='centre'), path, label_col='ball', valid_col='valid', spacing=None,
            size=18, bs=10, batch_tfms=None, num_workers=0, device='cpu', cache=tmp_path_factory.mktemp('cache'))
    set_seed(0)
    learn = classifier_learner(dls, Tiny, fast=False, path=tmp_path_factory.mktemp('learn'))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(14, 1e-2)
    return learn

def test_interpret_a_volume_classifier(learn3, volumes):
    it = learn3.interpret(n_boot=50)
    assert it.task=='category' and it.labels==['yes'] and len(it)==20 and it.group_col=='subject'
    y,p,_ = it.one()
    assert area_under(pred=p, targ=y, n_boot=2)>.9
    assert it.confusion().values.sum()==20 and set(it.by('site').index)=={'a','b',
            'all'} and it.confounding('site').counts.values.sum()==20
    assert it.plot_worst(2) is not None and len(it.plot_worst(2, target='yes').axes)==6
    p = learn3.evaluate()[[f'prob_{k}' for k in it.vocab]].to_numpy(float)
    assert np.array_equal(p, it.p)
    assert list(it.worst(20).loss)==sorted(it.losses(), reverse=True)

def test_interpret_a_slice_classifier_counts_cases(volumes, tmp_path):
    "A case has many slices and one answer"
    path,df = volumes
    dls = SliceDataLoaders.from_df(df.drop(columns='centre'), path, label_col='ball', valid_col='valid', spacing=None,
                                   bs=10, num_workers=0, device='cpu', cache=tmp_path)
    assert len(dls.valid.items)>20
    learn = classifier_learner(dls, 'small_resnet', nf=2)
    it = learn.interpret(n_boot=5)
    p = learn.evaluate()[[f'prob_{k}' for k in it.vocab]].to_numpy(float)
    assert len(it)==20 and np.array_equal(p, it.p) and it.plot_worst(1) is not None

def test_cam_points_at_the_ball_in_the_scans_own_space(learn3, volumes):
    path,df = volumes
    hits = []
    for i in range(41, 60, 2):
        cam = grad_cam(learn3, df.drop(columns='centre').iloc[i], 'yes', space='scan')
        own = nib.load(path/df.image[i])
        assert isinstance(cam, TensorVolume) and tuple(cam.shape[1:])==own.shape and np.allclose(cam.affine, own.affine)
        hits.append(np.linalg.norm(np.array(np.unravel_index(int(cam[0].argmax()), own.shape))-df.centre[i])<=5)
    assert np.mean(hits)>=.8, hits
    a = grad_cam(learn3, str(path/df.image[41]), 'yes')
    assert np.allclose(np.asarray(a), np.asarray(grad_cam(learn3, item_of(learn3, df.iloc[41])[None], 'yes')))
    # the network sees what evaluate shows it
    x = learn3.case_input(str(path/df.image[41]))
    assert torch.equal(x[0], item_of(learn3, str(path/df.image[41])).as_subclass(torch.Tensor))
    with pytest.raises(InputError, match='none of'): grad_cam(learn3, df.iloc[41], 'maybe')

def test_interpret_survives_export_and_bad_files(learn3, volumes, tmp_path):
    path,df = volumes
    valid = learn3.dls.valid_ds.items
    it = learn3.interpret(n_boot=20)
    learn3.export('c.pkl')
    again = load_learner(learn3.path/'c.pkl')
    with pytest.raises(InputError, match='holds no data'): again.interpret()
    bad = valid.copy()
    bad['image'] = bad.image.astype(object)
    bad.iloc[3, bad.columns.get_loc('image')] = 'gone.nii'
    got = again.interpret(bad, n_boot=20)
    assert len(got)==19 and len(got.failed)==1 and 'could not be predicted' in got.answer()
    keep = np.arange(20)!=3
    assert np.array_equal(got.p, it.p[keep]) and list(got.df.site)==list(valid.site[keep])
    assert np.array_equal(learn3.interpret(dl=learn3.dls.test_dl(valid, with_labels=True), n_boot=20).p, it.p)
    page = got.report(tmp_path/'r.html', worst=1, by=['site']).read_text()
    assert page.count('<img')>=5 and 'Is yes read from site?' in page
    for kw,e in ((dict(df=valid, dl=learn3.dls.valid),ArgumentError), (dict(boots=1),ArgumentError)):
        with pytest.raises(e): learn3.interpret(**kw)

def test_fastais_own_interpretation(learn3):
    it = ClassificationInterpretation.from_learner(learn3)
    assert np.array_equal(it.confusion_matrix(), learn3.interpret(n_boot=2).confusion().values)
    it.plot_top_losses(2)
    it.plot_confusion_matrix()
    Interpretation.from_learner(learn3).plot_top_losses(2)

def test_training_curves(learn3, loaders):
    # get_preds was called since
    t = learn3.training_table()
    assert list(t.columns[:3])==['fit','train_loss','valid_loss'] and len(t)==14 and 'roc_auc' in t
    assert len([a for a in learn3.plot_metrics().axes if a.axison])==len(t.columns)-2
    seg = unet3d_learner(loaders[3], nf=4, depth=2)
    with pytest.raises(InputError, match='there was no training'): seg.plot_metrics()
    with seg.no_bar(), seg.no_logging():
        seg.fit(1)
        seg.validate()
        seg.fit(2)
    assert seg.plot_metrics().axes[1].get_ylabel()=='dice' and list(seg.training_table().fit)==[1,2,
            2] and list(seg.training_table().index)==[1,2,3]
    with pytest.raises(InputError, match='show_worst'): seg.interpret()
    with pytest.raises(InputError, match='one score a class'): grad_cam(seg.model, seg.dls.one_batch()[0])

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        a = 100+20*rng.normal(size=(32,32))
        s = int(rng.integers(0, 3))
        a[4:12,4:12] += 60*(s>0)
        a[20:28,20:28] += 60*(s>1)
        Image.fromarray(a.clip(0, 255).astype(np.uint8)).save(path/f'{i}.png')
        rows.append(dict(image=f'{i}.png', subject=i//2, kind='abc'[s], left=int(s>0), right=int(s>1),
                         size=float(s)+.1*rng.normal(), sex='FM'[i%2]))
    return path,pd.DataFrame(rows)

@pytest.mark.parametrize('label,task', [('kind','category'), (['left','right'],'multi'), ('size','regression'),
        (['size','left'],'regression')])
def test_interpret_radiographs(pictures, tmp_path, label, task):
    path,df = pictures
    df = df.assign(left=df.left.astype(float)+.1*df['size']) if label==['size','left'] else df
    dls = RadiographDataLoaders.from_df(df, path, label_col=label, size=32, bs=8, num_workers=0, device='cpu',
                                        cache=tmp_path/'cache')
    learn = classifier_learner(dls, 'small_resnet', nf=4, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    it = learn.interpret(n_boot=20)
    assert it.task==task and it.vocab==[str(o) for o in dls.vocab] and len(it)==len(dls.valid_ds)
    assert (it.summary().n==len(it)).all() and it.plot_worst(2) is not None
    for k in it.labels:
        assert it.by('sex', label=k).n['all']==len(it)
        it.plot_by('sex', label=k)
    if task=='category':
        assert 'accuracy' in it.by('sex') and it.by('sex').accuracy['all']==pytest.approx(it.summary().value['all',
                'accuracy'])
        it.plot_by('sex')
    if task=='regression':
        it.plot_agreement(it.vocab[0])
        assert it.summary().value[it.vocab[0],'mae']==pytest.approx(np.abs(it.p-it.y).mean(0)[0])
    if task!='category': assert it.report(tmp_path/'r.html', worst=1, by=['sex']).stat().st_size>10_000
    c = grad_cam(learn, dls.valid_ds.items.iloc[0], None if it.labels==['size'] or task!='regression' else 'left')
    assert tuple(c.shape)==(1,32,32)
    if task=='regression' and len(it.vocab)>1:
        with pytest.raises(ArgumentError, match='give target'): grad_cam(learn, dls.valid_ds.items.iloc[0])

def test_interpret_a_learner_of_fastais_own(pictures):
    "No DataLoaders of ours, a network with a head of fastai's: get_preds is enough"
    from fastai.vision.all import ImageDataLoaders, Resize, resnet18
    path,df = pictures
    dls = ImageDataLoaders.from_df(df[['image','kind']], path, bs=8, num_workers=0, device='cpu', item_tfms=Resize(64))
    learn = vision_learner(dls, resnet18, pretrained=False, path=path)
    it = learn.interpret(n_boot=20)
    assert it.task=='category' and it.vocab==['a','b','c'] and it.p.sum(1)==pytest.approx(1,
                                              abs=1e-4) and 'image' in it.df
    p,y = learn.get_preds()
    assert np.allclose(it.p, p, atol=1e-5) and np.array_equal(it.y, y)
    assert grad_cam(learn, dls.one_batch()[0]).shape==(8,64,64)

# ---- numbers that a reviewer checks

def test_a_chosen_threshold_rules_the_whole_row():
    "Accuracy and balanced accuracy went by 0.5 whatever the point was: 0.509 where 0.714 was right"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    p = np.clip(.15*y+.1+rng.normal(0, .1, 400), 0, 1)
    for point in (.17, 'youden', ('sensitivity',.9)):
        called = p>=choose_point(pred=p, targ=y, point=point)
        for task,pred,targ,vocab in (('category', np.c_[1-p,p], y, ['no','yes']),
                                     ('multi', p[:,None], y[:,None], ['yes'])):
            found = {k:v for (k,_),v in label_scores(task, vocab, pred=pred, targ=targ, point=point).items()}
            assert found['accuracy']==pytest.approx((called==y).mean())
            assert found['balanced_accuracy']==pytest.approx((found['sensitivity']+found['specificity'])/2)
    lone = label_scores('category', ['no','yes'], pred=np.c_[1-p,p], targ=y*0, point='youden')
    assert np.isnan(lone['accuracy','all']), 'a rule that lacks a class decides nothing'

@pytest.mark.parametrize('f', [r_squared, mean_abs_error, balanced_accuracy])
def test_shapes_that_do_not_match_are_refused(f):
    "R² of a perfect prediction of shape (n,1) was -5"
    y = np.arange(6.)
    with pytest.raises(ValueError, match='as many predictions'): f(pred=y[:,None], targ=y)
    with pytest.raises(ValueError, match='expected targets'):
        label_scores('regression', ['a','b'], pred=np.zeros((6,2)), targ=np.zeros((6,3)))

def test_scores_stay_float64():
    y = torch.arange(5, dtype=torch.float64)+2**40
    assert mean_abs_error(pred=y+.25, targ=y)==.25
    p = torch.tensor([.5, .5+1e-12], dtype=torch.float64)
    assert roc_auc(pred=p, targ=[0,1])==1

def test_calibration_error_without_its_bias():
    "Perfect probabilities of 200 cases had an ECE of 0.07; what chance makes is taken away, and what is wrong stays"
    off = {}
    for name,bend in (('perfect', lambda p: p), ('wrong', lambda p: p**2)):
        square = []
        for s in range(60):
            rng = np.random.default_rng(s)
            p = rng.uniform(.02, .98, 200)
            square.append(float(calibration(pred=bend(p), targ=rng.uniform(size=200)<p, n_boot=1).error)**2)
        off[name] = np.mean(square)
    p = np.random.default_rng(0).uniform(.02, .98, 100_000)
    assert off['perfect']<.002 and off['wrong']==pytest.approx(((p-p**2)**2).mean(), rel=.15), off

def test_slope_and_intercept_of_calibration():
    "Of logits that are twice too large and moved, against scikit-learn and by hand"
    from sklearn.linear_model import LogisticRegression
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1.5, 800)
    y = rng.uniform(size=800)<1/(1+np.exp(-x))
    logit = 2*x+.7
    c = calibration(pred=1/(1+np.exp(-logit)), targ=y, n_boot=200)
    assert c.slope==pytest.approx(LogisticRegression(C=1e9).fit(logit[:,None], y).coef_.item(), abs=1e-3)
    assert c.slope.low<.5<c.slope.high and c.intercept.high<0
    assert np.mean(1/(1+np.exp(-(logit+c.intercept))))==pytest.approx(y.mean(), abs=1e-6)
    assert np.isnan(calibration(pred=np.where(y, .9, .1), targ=y, n_boot=2).slope)

def test_two_classifiers_on_the_same_cases():
    "The difference of two areas by draws of subjects; of 200 subjects the interval is DeLong's"
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 200)
    a = y+rng.normal(0, 1, 200)
    b = a+rng.normal(0, 1, 200)
    d = area_difference(pred=a, other=b, targ=y)
    def placed(s): return [np.array([(np.mean(v>rest)+np.mean(v==rest)/2) for v in own]) for own,rest in
                           ((s[y==1], s[y==0]), (-s[y==0], -s[y==1]))]
    parts = [u-v for u,v in zip(placed(a), placed(b))]
    se = np.sqrt(sum(o.var(ddof=1)/len(o) for o in parts))
    assert d==pytest.approx(parts[0].mean()) and d.low==pytest.approx(d-1.96*se, abs=.012)
    assert d.high==pytest.approx(d+1.96*se, abs=.012)
    order = rng.permutation(200)
    turned = area_difference(pred=a[order], other=b[order], targ=y[order], groups=np.arange(200)[order])
    assert turned==pytest.approx(d, abs=1e-12)

def test_a_point_chosen_on_the_same_cases_says_so():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 60)
    it = CaseInterpretation(y, np.clip(.3*y+rng.uniform(0, .7, 60), 0, 1), n_boot=10, point='youden')
    assert 'chosen on these very cases' in str(it.point()) and 'chosen on these very cases' in it.answer()
    assert 'chosen' not in CaseInterpretation(y, y*.5+.2, n_boot=10, point=.5).answer()

def test_decision_curve_and_two_models():
    "Net benefit by hand; two models on unlike cases are refused; a `$` in a class is no formula"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 120)
    names = ['no','$^{ yes']
    a,b = [CaseInterpretation(y, np.clip(.4*y+rng.uniform(0, s, 120), 0, 1), names, n_boot=50) for s in (.6,1.5)]
    net = a.decision()
    t,p = .3,a.p[:,1]
    hits,false = ((p>=t)&(y==1)).sum(),((p>=t)&(y==0)).sum()
    assert net.model[t]==pytest.approx((hits-false*t/(1-t))/120) and (net.none==0).all()
    assert a.compare(b).low>0 and a.compare(b)==-b.compare(a)
    with pytest.raises(ValueError, match='the same 120 cases'): a.compare(CaseInterpretation(1-y, p, names, n_boot=5))
    for plot in (a.plot_decision, a.plot_curves, a.plot_calibration, a.plot_confusion): plot()
