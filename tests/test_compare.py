"Comparisons: statistics against SciPy, experiments that are killed, twins, and executors."
import contextlib
import html
import json
import multiprocessing
import os
import re
import shutil
import signal
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import forked
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import CODES, affine_of, dies, write_case
from scipy import stats

from fastmed.all import (
    Comparison,
    compare_learners,
    group_folds,
    label_efficiency,
    load_volume,
    mean_interval,
    paired_comparison,
)
from fastmed.metrics.masks import slice_consistency
from fastmed.metrics.paired import flip_test, loss_falls, smallest_shown, training_luck
from fastmed.metrics.scores import roc_auc
from fastmed.metrics.stats import holm
from fastmed.study.arms import keep_model, load_run
from fastmed.study.efficiency import LabelEfficiency, thick_slices
from fastmed.study.findings import Findings, common_scores


# --- statistics
def scores(n=40, shift=.01, seed=0):
    rng = np.random.default_rng(seed)
    b = .85+.05*rng.normal(size=n)
    return b+shift+.02*rng.normal(size=n), b

@pytest.mark.parametrize('n', [8,25,60,110])
def test_wilcoxon_is_scipys(n):
    a,b = scores(n, seed=n)
    assert paired_comparison(a, b).p_wilcoxon==pytest.approx(stats.wilcoxon(a, b).pvalue, rel=1e-12)
    a,b = a.round(2),b.round(2)                                     # ties, and differences of zero
    assert paired_comparison(a, b).p_wilcoxon==pytest.approx(stats.wilcoxon(a-b).pvalue, rel=1e-12)

@pytest.mark.parametrize('n', [6,9,13,40])
def test_flips_of_signs_are_scipys(n):
    "Exact with few subjects; drawn patterns come near"
    a,b = scores(n, seed=n)
    s = stats.permutation_test((a-b,), lambda d, axis: d.mean(axis), permutation_type='samples', vectorized=True,
                               n_resamples=np.inf if n<14 else 20_000, rng=np.random.default_rng(1))
    tol = dict(rel=1e-12) if n<14 else dict(abs=.006)
    assert paired_comparison(a, b).p==pytest.approx(s.pvalue, **tol)

@pytest.mark.parametrize('n', [5,20,40])
def test_interval_of_few_subjects_is_students(n):
    "Of draws it was a fifth too narrow with five subjects; two like cases of a subject change nothing"
    a,b = scores(n, seed=n)
    expected = stats.ttest_rel(a, b).confidence_interval()
    assert paired_comparison(a, b).ci==pytest.approx(tuple(expected), rel=1e-9)
    twice = paired_comparison(np.repeat(a, 2), np.repeat(b, 2), np.repeat(range(n), 2))
    assert twice.ci==pytest.approx(tuple(expected), rel=1e-9)

def test_the_interval_and_the_p_value_are_of_one_mean():
    "The interval said that a is better and the p value, of ranks, that b is"
    who = np.r_[np.repeat(range(4), 30), range(4, 29)]
    rng = np.random.default_rng(0)
    d = np.r_[np.full(120, .01), np.full(25, -.005)]+.004*rng.normal(size=29)[who]+.002*rng.normal(size=145)
    r = paired_comparison(d, 0*d, who)
    assert r.mean>0 and r.p>.05 and r.p_wilcoxon<.05
    # four subjects hold nearly all cases: their interval, not that of 29
    assert r.high-r.low>2*3*np.std([d[who==k].mean() for k in range(4)])/2

def test_fewer_than_six_subjects_show_nothing():
    a,b = scores(5, shift=.5)
    r = paired_comparison(a, b, equal_within=1.)
    assert r.low>0 and r.p==2/32 and r.detectable==np.inf and r.equivalent is False
    assert 'no p below 0.05 can be had' in str(r) and 'which takes 6 subjects' in str(r)
    r = paired_comparison(*scores(6, shift=.5), equal_within=1.)
    assert r.p==2/64 and np.isfinite(r.detectable) and r.equivalent and 'no p below' not in str(r)
    # eight questions at once: as many as seven subjects are too few
    t = paired_comparison(pd.DataFrame({k:scores(7, seed=k)[0] for k in range(8)}),
                          pd.DataFrame({k:scores(7, seed=k)[1] for k in range(8)}))
    assert np.isinf(t.detectable).all()

def test_equivalence_is_not_declared_of_two_subjects():
    "In a quarter of all studies of two subjects whose models differ by the margin it was"
    said = [paired_comparison(d, 0*d, equal_within=.01).equivalent for d in
            np.random.default_rng(0).normal(.01, .01, (60,2))]
    assert not any(said)

def study_of(rng, n, shift=0.):
    "Two cases of each of n subjects: (differences, subjects)"
    return shift+(.02*rng.normal(size=(n,1))+.01*rng.normal(size=(n,2))).ravel(),np.repeat(range(n), 2)

@pytest.mark.parametrize('n', [5,12])
def test_coverage_and_type_1_error(n):
    "Draws of subjects covered 0.84 and 0.91; benchmarks/coverage.py has the whole table"
    rng,hit,found = np.random.default_rng(n),0,0
    for _ in range(400):
        d,who = study_of(rng, n)
        low,high = mean_interval(d, who)
        hit += low<=0<=high
        found += flip_test(np.bincount(who, d))<.05
    assert 367<=hit<=394, hit
    assert found==0 if n<6 else 8<=found<=34, found

@pytest.mark.parametrize('n', [7,12,40])
def test_the_detectable_difference_is_detected(n):
    "In four of five studies; with seven subjects it was in fewer than half"
    rng,draws = np.random.default_rng(n),400 if n<15 else 60
    shift = smallest_shown(np.full(n, 2), np.sqrt((.02**2+.01**2/2)/n), n-1)
    found = sum(flip_test(np.bincount(who, d))<.05 for d,who in (study_of(rng, n, shift) for _ in range(draws)))
    assert abs(found/draws-.8)<.12 if n>15 else abs(found/draws-.8)<.06, found/draws

def test_six_of_six_is_not_certain():
    "The interval was [1, 1]; two cases of a subject that agree count as one"
    assert mean_interval([1]*6)==pytest.approx(tuple(stats.binomtest(6, 6).proportion_ci(method='wilson')))
    assert mean_interval([1]*12, np.repeat(range(6), 2))==pytest.approx(mean_interval([1]*6))
    assert mean_interval([1,0,1,1,1,1]*2)!=mean_interval([1,0,1,1,1,1]*2, list(range(6))*2)
    rng,hit = np.random.default_rng(0),0
    for _ in range(400):
        low,high = mean_interval(rng.random(12)<.9)
        hit += low<=.9<=high
    assert 365<=hit<=396, hit

def test_order_of_rows_changes_no_interval():
    rng = np.random.default_rng(0)
    for n in (9,70):
        d,who = study_of(rng, n)
        o = rng.permutation(len(d))
        x,y = paired_comparison(d, 0*d, who),paired_comparison(d[o], 0*d, who[o])
        for k in ('mean','low','high','p','detectable'): assert x[k]==pytest.approx(y[k], abs=1e-15), k

def twin_claims(n, k, sd, repeats, seed=0):
    "How often a difference is claimed between two arms of one recipe, k trainings each on five folds"
    rng,fold,found = np.random.default_rng(seed),np.arange(n)%5,0
    for _ in range(repeats):
        trained = sd*(rng.normal(size=(5,k))-rng.normal(size=(5,k)))
        d = trained[fold]+.01*rng.normal(size=(n,k))
        r = paired_comparison(d.mean(1), np.zeros(n), luck=training_luck(d, fold))
        found += r.p<.05 and r.low*r.high>0
    return found/repeats

def test_the_luck_of_training_is_no_difference():
    "Of twins trained three times; with one seed, or where trainings are forgotten, a third of them differ"
    assert twin_claims(30, 3, .006, 80)<=.1
    assert twin_claims(30, 1, .006, 80)>.15

def test_interval_is_scipys():
    a,b = scores(60)
    r = paired_comparison(a, b, n_boot=20_000)
    s = stats.bootstrap((a-b,), np.mean, n_resamples=20_000, method='percentile', rng=np.random.default_rng(1))
    assert r.ci==pytest.approx(tuple(s.confidence_interval), abs=3e-4) and r.se==pytest.approx(s.standard_error,
            rel=.03)
    assert r.mean==pytest.approx((a-b).mean()) and r.median==pytest.approx(np.median(a-b))

def test_subjects_are_drawn_whole():
    """Each case twice, as two cases of one subject: the interval is that of the cases once; without groups it is
    narrower by the root of two"""
    a,b = scores(40)
    once = paired_comparison(a, b, n_boot=20_000)
    aa,bb,g = np.repeat(a,2),np.repeat(b,2),np.repeat(np.arange(40),2)
    twice,blind = paired_comparison(aa, bb, g, n_boot=20_000),paired_comparison(aa, bb, n_boot=20_000)
    assert twice.se==pytest.approx(once.se, rel=.03) and twice.p==pytest.approx(once.p, abs=3e-4)
    assert blind.se==pytest.approx(once.se/2**.5, rel=.03)
    assert (twice.n, twice.subjects)==(80,40)

def test_interval_covers():
    "Of 200 draws of the same world the 95 % interval holds the true difference in about 95 %; subjects of two cases"
    hits = 0
    for i in range(200):
        rng = np.random.default_rng(i)
        g = np.repeat(np.arange(30),2)
        d = .01+.02*rng.normal(size=30)[g]+.005*rng.normal(size=60)
        lo,hi = paired_comparison(d, np.zeros(60), g, n_boot=1000, seed=i).ci
        hits += lo<=.01<=hi
    assert 183<=hits<=198

def test_equivalence_needs_evidence():
    rng = np.random.default_rng(0)
    d = .002*rng.normal(size=40)
    assert paired_comparison(d, 0*d, equal_within=.005).equivalent
    assert not paired_comparison(d[:3]*20, 0*d[:3], equal_within=.005).equivalent
    assert not paired_comparison(d+.01, 0*d, equal_within=.005).equivalent

def test_holm():
    p = [.011,.02,.03,.8]
    assert holm(p)==pytest.approx([.044,.06,.06,.8])
    assert holm([.5])==pytest.approx([.5]) and holm([]).size==0

def test_series_are_matched_by_case():
    a,b = scores(20)
    i = [f'c{k}' for k in range(20)]
    o = np.random.default_rng(0).permutation(20)
    x = paired_comparison(pd.Series(a, i), pd.Series(b, i))
    y = paired_comparison(pd.Series(a, i), pd.Series(b, i).iloc[o])
    assert x==y
    with pytest.raises(ValueError, match='one side alone'):
        paired_comparison(pd.Series(a, i), pd.Series(b, i[:-1]+['other']))
    with pytest.raises(ValueError, match='twice'): paired_comparison(pd.Series(a, ['c']*20), pd.Series(b, i))

def test_one_case_has_no_interval():
    r = paired_comparison([.9], [.8])
    assert r.mean==pytest.approx(.1) and np.isnan(r.ci).all() and r.p==1

# --- folds and slices
def test_folds_keep_subjects_and_forget_the_order(study):
    df = study[1]
    f = group_folds(df, 3)
    assert len(set(f))==3 and all(len(set(f[df.subject==s]))==1 for s in df.subject)
    o = np.random.default_rng(0).permutation(len(df))
    assert (group_folds(df.iloc[o].reset_index(drop=True), 3)==f[o]).all()
    with pytest.raises(ValueError, match='at least 5 groups'): group_folds(df, 5)

def test_slices_that_flicker():
    m = np.zeros((12,20,20), int)
    m[2:10,5:15,5:15] = 1
    j = m.copy()
    j[4] = 0
    j[7] = np.roll(j[7], 4, 0)
    r = slice_consistency(j, 0, truth=m).loc['1']
    assert r.overlap<-.2 and r.area_jump>.2
    assert slice_consistency(m, 0).loc['1'].tolist()==[1,0,0]
    with pytest.raises(ValueError, match='axis'): slice_consistency(m, 3)

@pytest.mark.parametrize('code', ['RAS','PIL','ASL'])
@pytest.mark.parametrize('axis', [0,1,2])
def test_thick_slices_stay_in_place(code, axis, tmp_path):
    "The centre of mass of a scan does not move when its slices are put together"
    write_case(tmp_path, 'c', affine_of(code, (1,1.5,2), (3,4,5)), (24,24,24), image=lambda a: np.where(a>.5, a, 0))
    t = load_volume(tmp_path/'images/c.nii')
    def centre(v):
        a = v.numpy()[0].astype(float)
        i = np.array([(a*g).sum() for g in np.indices(a.shape)])/a.sum()
        return v.affine[:3,:3]@i+v.affine[:3,3]
    k = thick_slices(t, 3, axis)
    assert k.spacing[axis]==pytest.approx(3*t.spacing[axis]) and centre(k)==pytest.approx(centre(t), abs=.1)

# --- experiments
SMALL = dict(codes=CODES, folds=2, budget=dict(updates=6), nf=4, depth=2, bs=2, samples_per_case=2, patch=16,
             spacing=1.25, device='cpu')
ARMS = {'3D':dict(ndim=3), '2D':dict(ndim=2, patch=(16,16,1), axis=2)}

@pytest.fixture
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def whole(study, tmp_path_factory):
    "A comparison that was never stopped"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    c = make(study, tmp_path_factory.mktemp("whole")).run()
    torch.set_num_threads(n)
    return c

def make(study, tmp, arms=ARMS, **kwargs):
    path,df = study
    df = df.assign(image=[str(path/o) for o in df.image], mask=[str(path/o) for o in df['mask']])
    return Comparison(df, arms, path=Path(tmp)/'c', cache=Path(tmp)/'s', **{**SMALL, **kwargs})

def whole_df(study):
    path,df = study
    return df.assign(image=[str(path/o) for o in df.image], mask=[str(path/o) for o in df['mask']])

def table(c): return c.results.sort_values(['arm','fold','seed','case','structure']).reset_index(drop=True)

@pytest.mark.slow
def test_killed_and_started_again(study, whole, tmp_path):
    """SIGKILL in the middle of the first, the second and the third run, each time started again: the same table, and
    nothing trained twice"""
    code = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from test_compare import make
import pandas as pd
make((Path(sys.argv[3]), pd.read_csv(sys.argv[3]+'/cases.csv')), sys.argv[1]).run()
"""
    env = {**os.environ,
           'PYTHONPATH':os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent),
           *filter(None, [os.environ.get('PYTHONPATH')])]), 'PYTHONWARNINGS':'ignore'}
    for n in (0,1,2):
        (tmp_path/'run.py').write_text(dies(f"self.training and self.train_iter=={1+2*n} and "
                                            f"len(list(Path({str(tmp_path)!r}).glob('c/*, fold*')))=={n}")+code)
        p = forked.run([tmp_path/'run.py', tmp_path, Path(__file__).parent, study[0]], tmp_path, env)
        assert p.returncode==-signal.SIGKILL, p.stderr[-2000:]
        assert len(list(tmp_path.glob('c/*, fold*')))==n and (tmp_path/'c'/'unfinished').exists()
    stamps = {f:f.stat().st_mtime_ns for f in tmp_path.glob('c/*, fold*/results.csv')}
    assert len(stamps)==2
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    c = make(study, tmp_path).run()
    torch.set_num_threads(n)
    pd.testing.assert_frame_equal(table(c), table(whole))
    assert all(f.stat().st_mtime_ns==t for f,t in stamps.items()) and not (tmp_path/'c'/'unfinished').exists()

class OwnNet(torch.nn.Sequential):
    def __init__(self, n_in, n_out):
        super().__init__(torch.nn.Conv3d(n_in, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, n_out, 1))
        self.divisor = (1,1,1)

class Evil:
    def __init__(self, fn): self.fn = fn
    def __reduce__(self): return Path.touch,(Path(self.fn),)

def test_runs_are_files_that_run_nothing(study, whole):
    "And they answer as they did when they were scored"
    runs = sorted(whole.path.glob('*, fold*'))
    assert len(runs)==4 and all((r/'model.safetensors').exists() and not (r/'model.pkl').exists() for r in runs)
    for arm in ('3D','2D'):
        case = whole.results.case[0]
        i = list(study[1].case.astype(str)).index(case)
        ev = whole.learner(arm, case).evaluate(whole.df[i:i+1])
        was = whole.results[(whole.results.arm==arm)&(whole.results.case==case)]
        np.testing.assert_array_equal(ev.dice.to_numpy(float), was.dice.to_numpy(float))
        assert whole.learner(arm, case).saw(whole.df) and case not in whole.learner(arm, case).saw(whole.df)

def test_a_comparison_of_an_earlier_version(study, whole, tmp_path):
    "Its models are pickles: scores and report need none of them, and whoever needs one is told how to open it"
    import shutil
    c = make(study, tmp_path)
    shutil.copytree(whole.path, c.path)
    for r in c.path.glob('*, fold*'):
        (r/'model.safetensors').unlink()
        torch.save(Evil(tmp_path/'ran'), r/'model.pkl')
        unsealed(r/'run.json')
    pd.testing.assert_frame_equal(c.summary(), whole.summary())
    assert c.answer()==whole.answer() and c.plan.done.all()
    text = c.report(tmp_path/'r.html').read_text()
    assert 'No pictures' in text and 'trust=True' in text
    for ask in (lambda: c.learner('3D'), lambda: c.learners_of(0), lambda: c.shift(factors=(1,))):
        with pytest.raises(ValueError, match=r'model.pkl: is not a .safetensors file.*give trust=True'): ask()
    assert not (tmp_path/'ran').exists()
    for r in c.path.glob('*, fold*'):
        l = load_run(whole.path/r.name)
        l.path = r
        l.export('model.pkl')
    trusting = make(study, tmp_path, trust=True)
    fn = whole.df.image[0]
    with pytest.warns(UserWarning, match='model.pkl: is opened as a pickle, and what is in it is run'):
        learn = trusting.learner('3D')
    assert torch.equal(learn.predict_volume(fn), whole.learner('3D').predict_volume(fn))
    (next(iter(c.path.glob('*, fold*')))/'model.pkl').unlink()
    with pytest.raises(OSError, match='no such model file'): [load_run(r, trust=True) for r in c.path.glob('*, fold*')]

def test_an_arm_with_a_network_of_ones_own(study, tmp_path, one_thread):
    c = Comparison(whole_df(study), {'own':dict(ndim=3, arch=OwnNet)}, path=tmp_path/'c', cache=tmp_path/'s',
            **{k:v for k,v in SMALL.items() if k not in ('nf','depth')})
    with pytest.warns(UserWarning, match='OwnNet is not a network with a known name'): c.run()
    l = c.learner('own')
    assert isinstance(l.model, OwnNet) and l.predict_volume(c.df.image[0]).shape
    folder = next(c.path.glob('own, fold*'))
    with pytest.raises(ValueError, match='arch=make'): load_run(folder)
    assert isinstance(load_run(folder, arch=lambda: OwnNet(1, 3)).model, OwnNet)

def test_a_run_that_no_model_file_can_hold_is_kept_all_the_same(study, tmp_path, learner):
    learn = learner(3)
    learn.model.encoder[0][2] = torch.nn.Tanh()
    (tmp_path/'r').mkdir()
    with pytest.warns(UserWarning, match='kept as model.pkl, a pickle'):
        assert keep_model(learn, tmp_path/'r').name=='model.pkl'
    with pytest.raises(ValueError, match='trust=True'): load_run(tmp_path/'r')
    fn = study[0]/study[1].image[0]
    assert torch.equal(load_run(tmp_path/'r', trust=True).predict_volume(fn), learn.predict_volume(fn))

@pytest.mark.slow
def test_processes_give_the_same_table(study, whole, tmp_path, one_thread):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('spawn')) as ex:
        c = make(study, tmp_path).run(executor=ex)
    pd.testing.assert_frame_equal(table(c), table(whole))

@pytest.mark.slow
def test_dask_gives_the_same_table(study, whole, tmp_path, one_thread):
    dd = pytest.importorskip('distributed')
    with dd.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None,
                         local_directory=str(tmp_path)) as cl, dd.Client(cl) as client:
        c = make(study, tmp_path).run(executor=client.get_executor())
    pd.testing.assert_frame_equal(table(c), table(whole))

def test_twins_do_not_differ(study, tmp_path, one_thread):
    c = make(study, tmp_path, {'one':dict(ndim=3), 'two':dict(ndim=3)}).run()
    r = c.paired().loc[('one','two','all')]
    assert r['mean']==0 and r.low==r.high==0 and r.p==1 and 'no difference' in c.answer()
    assert not len(c.differences())

def test_what_differs_is_listed(whole):
    d = whole.differences().index
    assert {'dimensions','patch','parameters','loss'}<=set(d)
    assert not {'held-out cases','training cases','spacing','orientation','normalisation','augmentation','selection',
                'post-processing','structures','top rate','budget'}&set(d)
    assert set(whole.results)=={'arm','fold','seed','case','subject','structure','dice','hd95','nsd','volume_mm3',
                                'target_mm3','diagonal_mm','status'}
    assert {'parameters','case_gflops','train_s','predict_s','peak_mb','voxels','updates'}<=set(whole.cost)

def test_one_augmentation_less_is_listed(study, tmp_path):
    c = make(study, tmp_path,
            {'with':dict(ndim=3), 'without':dict(ndim=3, batch_tfms=None, post='keep_largest', lr_max=1e-2)})
    assert set(c.check().index)=={'augmentation','post-processing','top rate'}

def test_other_terms_are_refused(study, whole, tmp_path):
    make(study, tmp_path)._check_folder()                         # as a run does
    for kw,word in ((dict(budget=dict(updates=7)),'budget'), (dict(folds=3),'folds'), (dict(nf=8),"arm '3D'")):
        with pytest.raises(ValueError, match='another experiment') as e: make(study, tmp_path, **kw)
        assert word in str(e.value)

def copied(study, whole, tmp_path):
    "The finished runs and the files in another place: (cases, folder of the runs)"
    path,df = study
    runs = tmp_path/whole.path.name
    shutil.copytree(whole.path, runs)
    for f in [*df.image, *df['mask']]:
        (tmp_path/'data'/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path/f, tmp_path/'data'/f)
    return (tmp_path/'data', df),runs

def emptied(fn):
    "Write a mask anew, without a structure"
    im = nib.load(fn)
    nib.save(nib.Nifti1Image(np.zeros(im.shape, np.uint8), im.affine), fn)

def unsealed(fn, *more):
    "Notes as an earlier version left them"
    facts = json.loads(fn.read_text())
    for k in more: assert facts.pop(k)
    for k in ('sums','seal','told'): facts.pop(k, None)
    fn.write_text(json.dumps(facts))

def forgotten(runs, name):
    "What an earlier version left: nothing of the contents"
    for f in [runs/name, *runs.glob('*/run.json')]: unsealed(f, 'files')

def test_notes_of_a_study_are_sealed(study, whole, tmp_path):
    "A budget that somebody wrote there is not what the runs had"
    there,runs = copied(study, whole, tmp_path)
    fn = runs/'comparison.json'
    fn.write_text(fn.read_text().replace('"updates": 6', '"updates": 9'))
    with pytest.raises(ValueError, match='comparison.json: expected what was noted'):
        make(there, tmp_path, budget=dict(updates=9))

def test_runs_say_what_they_were_told(study, whole, tmp_path):
    "Where the notes of the study are lost, of another study, or written anew with a right seal"
    there,runs = copied(study, whole, tmp_path)
    (runs/'comparison.json').unlink()
    pd.testing.assert_frame_equal(table(make(there, tmp_path)), table(whole))
    for kw,says in ((dict(budget=dict(updates=9)), 'budget was'), (dict(nf=8), 'arm was'), (dict(folds=3), 'folds was'),
                    (dict(codes=['background','small','large']), 'codes was')):
        with pytest.raises(ValueError, match=f'belongs to runs of another experiment: {says}'):
            make(there, tmp_path, **kw).summary()
    (runs/'plan, 3D.json').write_text('{}')              # trained without it
    with pytest.raises(ValueError, match='plan was None'): make(there, tmp_path).summary()

def test_lost_notes_are_told(study, whole, tmp_path):
    "Whether a file has changed since the runs is not known then"
    there,runs = copied(study, whole, tmp_path)
    (runs/'comparison.json').unlink()
    with pytest.warns(UserWarning, match='4 of 4 finished runs are of a version that did not store'):
        make(there, tmp_path)

def test_a_pickle_that_no_run_wrote_is_not_opened(study, whole, tmp_path):
    "Though pickles are trusted"
    there,runs = copied(study, whole, tmp_path)
    for r in runs.glob('*, fold*'):
        (r/'model.safetensors').unlink()
        torch.save(Evil(tmp_path/'ran'), r/'model.pkl')
    c = make(there, tmp_path, trust=True)
    for ask in (lambda: c.learner('3D'), lambda: c.learners_of(0)):
        with pytest.raises(ValueError, match='model.pkl: is not what this run wrote'): ask()
    assert not (tmp_path/'ran').exists()

def test_finished_runs_do_not_stand_for_a_corrected_mask(study, whole, tmp_path):
    there,_ = copied(study, whole, tmp_path)
    # other names, other times, the same content
    pd.testing.assert_frame_equal(table(make(there, tmp_path).run()), table(whole))
    fn = there[0]/there[1]['mask'][2]
    emptied(fn)
    with pytest.raises(ValueError, match='4 runs were .* evaluated with other content') as e: make(there, tmp_path)
    assert f"{there[1].case[2]!r} (mask). To train again" in str(e.value)
    shutil.copy(study[0]/study[1]['mask'][2], fn)                                        # the old file again
    assert make(there, tmp_path).plan.done.all()
    fn.unlink()
    # results can be read without the data
    assert len(table(make(there, tmp_path)))==len(table(whole))

def test_runs_that_noted_no_content_open_with_a_word(study, whole, tmp_path):
    there,runs = copied(study, whole, tmp_path)
    forgotten(runs, 'comparison.json')
    # and again: nobody knows any more now
    for _ in range(2):
        with pytest.warns(UserWarning, match='4 of 4 finished runs are of a version that did not store'):
            c = make(there, tmp_path).run()
        assert c.plan.done.all()
    emptied(there[0]/there[1]['mask'][2])
    # what changes from now on is seen
    with pytest.raises(ValueError, match='other content'):
        make(there, tmp_path)

def test_curves_do_not_stand_for_a_corrected_mask(tmp_path):
    df = pd.DataFrame([dict(write_case(tmp_path, f'c{i}', seed=i), subject=f's{i}', test=i>1) for i in range(4)])
    df = df.assign(image=[str(tmp_path/o) for o in df.image], mask=[str(tmp_path/o) for o in df['mask']])
    kw = {k:v for k,v in SMALL.items() if k!='folds'}
    def run():
        return label_efficiency(df, (1,), repeats=1, valid_col='test', path=tmp_path/'e', cache=tmp_path/'s',
                **{**kw, 'budget':dict(updates=1)})
    run()
    stamps = {f:f.stat().st_mtime_ns for f in (tmp_path/'e').glob('*.csv')}
    run()
    assert len(stamps)==1 and all(f.stat().st_mtime_ns==t for f,t in stamps.items())
    note, = (tmp_path/'e').glob('contents*.json')
    text = note.read_text()
    note.unlink()
    with pytest.warns(UserWarning, match='1 of 1 finished runs are of a version that did not store'): run()
    note.write_text(text)
    run()
    fn, = (tmp_path/'e').glob('*.csv')
    text = fn.read_text()
    fn.write_text(text.replace('c2', 'c9'))
    with pytest.raises(ValueError, match='is not what this run wrote'): run()
    fn.write_text(text)
    emptied(df['mask'][3])
    with pytest.raises(ValueError, match=r"1 runs were trained or evaluated with other content of case 'c3' \(mask\)"):
        run()

def test_mistakes_show_before_the_hours_are_spent(study, tmp_path):
    with pytest.raises(TypeError, match="arm 'a'.*nff"): make(study, tmp_path, {'a':dict(ndim=3, nff=3)}).run()
    for kw,word in ((dict(budget=dict(minutes=1, epochs=2)),'one of'), (dict(budget=dict(minutes=0)),'above 0'),
            (dict(folds=9),'at least 9 groups'), (dict(folds='nothing'),'nothing')):
        with pytest.raises((ValueError,KeyError), match=word): make(study, tmp_path/'x', **kw)

def test_a_seen_case_is_no_judge(study, whole):
    path,df = study
    df = df.assign(image=[str(path/o) for o in df.image], mask=[str(path/o) for o in df['mask']])
    two = whole.learners_of(0)
    held = whole.df[whole.fold==0]
    with pytest.raises(ValueError, match='has seen'): compare_learners(two, df, seen='refuse')
    with pytest.warns(UserWarning, match='leaves out'): f = compare_learners(two, df)
    assert set(f.results.case)==set(held.case)
    with pytest.raises(ValueError, match='every case'), pytest.warns(UserWarning):
        compare_learners(two, df[~df.case.isin(held.case)])
    # another name, a subject that was trained on
    sibling = held.assign(case=lambda d: 'new_'+d.case, subject=[whole.df.subject[whole.fold!=0].iloc[0]]*len(held))
    with pytest.raises(ValueError, match='every case'), pytest.warns(UserWarning): compare_learners(two, sibling)

def test_the_table_of_learners_is_that_of_the_run(study, whole):
    held = whole.df[whole.fold==0]
    f = compare_learners(whole.learners_of(0), held)
    key = ['arm','case','structure']
    a,b = [t.sort_values(key).reset_index(drop=True)[key+['dice','hd95','volume_mm3']]
                                                          for t in (f.results, whole.results[whole.results.fold==0])]
    pd.testing.assert_frame_equal(a, b)

def test_a_failed_case_counts_in_every_arm(study, tmp_path, one_thread):
    path,df = study
    c = make(study, tmp_path).run()
    t = c.results
    i = t[(t.arm=='3D')].index[:2]
    t.loc[i,['dice','hd95','nsd']] = np.nan
    t.loc[i,'status'] = 'error: gone'
    w = common_scores(t)
    case = t.case[i[0]]
    assert w.loc[(case,'all'),'3D']==0 and w.loc[(case,'all'),'2D']==common_scores(c.results).loc[(case,'all'),'2D']
    assert Findings(t).summary().loc[('3D','all'),'failed']==1

def test_a_run_that_is_not_finished_says_nothing():
    "It was filled up as if every structure had been rightly left out: Dice 1, HD95 0"
    rows = [dict(arm=a, fold=0, seed=k, case=f'c{i}', subject=f's{i}', structure='x', dice=.5, hd95=3., status='ok')
            for a,k in (('A',0), ('A',1), ('B',0)) for i in range(4)]
    for score,v in (('dice',.5), ('hd95',3.)): assert (common_scores(pd.DataFrame(rows), score)==v).all(None), score
    # case c0, seed 0, where B says rightly that there is nothing; A's second seed is compared with nothing
    rows[0].update(dice=0., status='false positive')
    rows[8].update(dice=np.nan, hd95=np.nan, status='empty')
    with pytest.warns(UserWarning, match="'B' lacks seed 1 of case 'c0', seed 1 of case 'c1'"):
        w = common_scores(pd.DataFrame(rows))
    assert w.loc[('c0','x')].to_dict()==dict(A=0., B=1.)

def arm_rows(arm, dice, seed=0, status=None):
    "Rows of one arm: a case a number"
    return pd.DataFrame([dict(arm=arm, fold=i%2, seed=seed, case=f'c{i:02}', subject=f's{i:02}', structure='x', dice=v,
                              nsd=v, hd95=1-v, volume_mm3=1., target_mm3=1., status=(status or {}).get(i, 'ok'))
                         for i,v in enumerate(dice)])

def test_a_third_arm_changes_nothing_between_two():
    "Where C drew what is not there, both others got a Dice of 1 for it; without C the case was left out"
    rng = np.random.default_rng(0)
    x = rng.uniform(.6, .9, (3,12))
    a,b = arm_rows('A', x[0], status={0:'empty'}),arm_rows('B', x[1], status={0:'empty'})
    c = arm_rows('C', x[2], status={0:'false positive', 3:'missed'})
    a.loc[0,['dice','nsd','hd95']] = b.loc[0,['dice','nsd','hd95']] = np.nan
    two,three = Findings(pd.concat([a, b])),Findings(pd.concat([a, b, c[c.case!='c05']]))
    for score in ('dice','nsd'):
        x,y = [f.paired(score).loc[[('A','B','all')],['mean','low','high','p','win','n']] for f in (two,three)]
        pd.testing.assert_frame_equal(x, y)
    assert common_scores(two.results).loc[('c00','x')].tolist()==[1,1]

def test_one_comparison_is_primary():
    "All nine paid for each other, so that six subjects could never show anything: ten points were 'no difference'"
    rng = np.random.default_rng(0)
    x = .8+.02*rng.normal(size=(3,6))
    x[0] += .1
    f = Findings(pd.concat([arm_rows(n, o) for n,o in zip('ABC', x)]))
    p = f.paired()
    assert p.primary.sum()==1 and p.p_holm[('A','B','all')]==p.p[('A','B','all')]==2/64
    assert (p.p_holm[~p.primary]>=p.p[~p.primary]).all() and np.isinf(p.detectable[~p.primary]).all()
    assert 'A reached' in f.answer() and 'is ahead of B by' in f.answer()
    assert '6 subjects are too few for any p < 0.05 after the correction for 5 comparisons' in f.answer()
    f.primary = ('C','A')
    assert f.paired().primary[('A','C','all')] and 'ahead of C by' in f.answer()
    f.primary = ('C','D')
    with pytest.raises(ValueError, match="primary: expected two of the arms"): f.paired()

def test_wins_follow_the_direction_of_the_score():
    f = Findings(pd.concat([arm_rows('A', np.linspace(.7, .8, 8)), arm_rows('B', np.linspace(.6, .7, 8))]))
    for score in ('dice','hd95'): assert f.paired(score).loc[('A','B','all'),['win','loss']].tolist()==[8,0]

def cost_of(**gflops): return pd.DataFrame([dict(arm=a, fold=0, seed=0, case_gflops=g) for a,g in gflops.items()])

def test_best_goes_by_a_margin_of_the_difference():
    "By the standard error of a mean: five points behind, p < 0.001, and recommended, since hard cases scatter"
    rng = np.random.default_rng(0)
    hard = .15*rng.normal(size=20)
    behind = arm_rows('B', .7+hard+.002*rng.normal(size=20))
    f = Findings(pd.concat([arm_rows('A', .75+hard), behind]), cost_of(A=9., B=1.))
    assert f.best()=='A' and 'no cheaper model was shown to keep within 0.5 points' in f.best().sentence
    assert f.best(equal_within=.06)=='B' and 'by no more than 6 points' in f.best(equal_within=.06).sentence
    assert f.best('hd95')=='B' and 'by no more than 0.5 mm' in f.best('hd95').sentence
    few = Findings(f.results[f.results.case<'c05'], f.cost)
    best = few.best(equal_within=.06)
    assert best=='A' and 'fewer than 6 subjects cannot show' in best.sentence
    with pytest.raises(ValueError, match='above 0'): f.best(equal_within=0)

def test_trainings_are_in_the_answer():
    "Three seeds: the interval is wider than that of subjects alone. One seed: a warning, and a sentence"
    rng,rows = np.random.default_rng(1),[]
    hard = .05*rng.normal(size=30)
    for arm in 'AB':
        for seed in range(3):
            luck = .01*rng.normal(size=2)
            rows.append(arm_rows(arm, .8+hard+luck[np.arange(30)%2]+.001*rng.normal(size=30), seed))
    f = Findings(pd.concat(rows))
    own = paired_comparison(*[common_scores(f.results).xs('all', level='structure')[a] for a in 'AB'])
    r = f.paired().loc[('A','B','all')]
    assert r['mean']==pytest.approx(own.mean) and r.high-r.low>1.5*(own.high-own.low) and r.p>own.p
    assert 'these trained networks' not in f.answer() and '3 trainings of each fold' in f.methods()
    wide,one = f.summary(),Findings(f.results[f.results.seed==0])
    assert (wide.high-wide.low>(one.summary().high-one.summary().low)*.9).all()
    with pytest.warns(UserWarning, match='the luck of training is not known'): one.paired()
    assert 'This holds for these trained networks' in one.answer()

def test_a_loss_that_still_falls_is_said():
    rng = np.random.default_rng(0)
    def log(arm, tau):
        return pd.DataFrame(dict(arm=arm, fold=0, seed=0, update=range(100),
                                 loss=np.exp(-np.arange(100)/tau)+.3+.01*rng.normal(size=100)))
    logs = pd.concat([log('A', 10), log('B', 60)])
    f = Findings(pd.concat([arm_rows('A', [.8]*8), arm_rows('B', [.8]*8)]), logs=logs)
    assert f.still_falling()==['B'] and 'The training loss of B was still falling' in f.answer()
    assert not loss_falls([3,2,1])

class Answers:
    "A Learner that has nothing to learn and answers with a table"
    def __init__(self, table): self.table = table
    no_bar = no_logging = lambda self: contextlib.nullcontext()
    def fit_one_cycle(self, *args, **kwargs): pass
    def evaluate(self): return self.table

def test_label_efficiency_knows_runs_by_the_function_that_made_them(tmp_path):
    "Runs of another `make` under the same path were given out as those of this one; and '01' came back as the number 1"
    df = pd.DataFrame(dict(case=[f'c{i}' for i in range(8)], subject=[f's{i}' for i in range(8)],
            test=[i<4 for i in range(8)]))
    def make(names, p):
        rows = pd.DataFrame(dict(case=df.case[:4], target=[names[i%2] for i in range(4)],
                status='ok')).assign(**{f'prob_{names[0]}':1-np.array(p), f'prob_{names[1]}':p})
        return lambda d: Answers(rows)
    for names,p,auc in ((('01','02'),(.1,.9,.2,.8),1), (('01','02'),(.9,.1,.8,.2),0), (('None','NA'),(.1,.9,.2,.8),1)):
        f = make(names, p)
        t = label_efficiency(df, sizes=(2,), repeats=1, make=lambda d, f=f: f(d), budget=dict(updates=1),
                             valid_col='test', path=tmp_path/'-'.join(names)/str(p)).summary()
        assert t.score.item()==auc
    def answer(high):
        def make(d):
            p = [.1,high,.2,high]
            return Answers(pd.DataFrame(dict(case=df.case[:4], target=[0,1,0,1], prob_0=[1-o for o in p], prob_1=p,
                                             status='ok')))
        return make
    scores = [label_efficiency(df, sizes=(2,), repeats=1, make=answer(h), budget=dict(updates=1), valid_col='test',
                               path=tmp_path/'one').summary().score.item() for h in (.9,.0)]
    assert scores==[1,0]

def test_label_efficiency_counts_a_case_that_was_not_read():
    "It left the mean without a word; a class that is a number came back as 1.0 and was known no more"
    rows = [dict(init='scratch', size=5, repeat=0, case=f'c{i}', subject=f's{i}', structure='x', dice=.8, status='ok')
                 for i in range(4)]
    rows[0].update(dice=np.nan, status='error: gone')
    t = LabelEfficiency(pd.DataFrame(rows), n_boot=10).summary()
    assert np.isclose(t.score, .6).all() and t.failed.item()==1
    rows = [dict(init='scratch', size=5, repeat=0, case=f'c{i}', subject=f's{i}', target=i%2, prob_0=1-i%2, prob_1=i%2,
                 status='ok') for i in range(5)]
    rows[0].update(target=np.nan, prob_0=np.nan, prob_1=np.nan, status='error: gone')
    t = LabelEfficiency(pd.DataFrame(rows), n_boot=10).summary()
    assert t.score.item()==1 and t.failed.item()==1

def test_report_needs_no_network(whole, tmp_path):
    fn = whole.report(tmp_path/'r.html', shift=whole.shift(factors=(1,2), folds=[0]))
    page = fn.read_text(encoding='utf-8')
    assert 'https:' not in page and 'http:' not in page and '<script' not in page and page.count('data:image/png')>=5
    for word in ('Thicker slices','What it costs','Post-processing','Method','staircase'): assert word in page

def test_a_report_reads_each_table_once(study, whole, tmp_path, monkeypatch):
    "One report of three arms read every table some forty times"
    c,read = make(study, whole.path.parent),[]
    own = pd.read_csv
    monkeypatch.setattr(pd, 'read_csv', lambda *args, **kwargs: (read.append(1), own(*args, **kwargs))[1])
    c.report(tmp_path/'r.html', pictures=0)
    # results, slices, remedied and log of four runs
    assert 0<len(read)<=4*len(c.plan)
    c.summary()
    assert len(read)<=4*len(c.plan)

def test_a_table_that_is_changed_by_hand_does_not_change_the_findings(study, whole):
    c = make(study, whole.path.parent)
    t = c.results
    t['dice'] = 0.
    pd.testing.assert_frame_equal(c.results, whole.results)

def test_a_run_that_was_written_anew_is_read_again(study, whole, tmp_path):
    "What was read once is not kept against what is there now"
    c = make(study, tmp_path)
    shutil.copytree(whole.path, c.path)
    before = c.results
    fn = next(c.path.glob('3D, fold 0*'))/'results.csv'
    pd.read_csv(fn).assign(dice=.25).to_csv(fn, index=False)
    with pytest.raises(ValueError, match='is not what this run wrote'): c.summary()
    shutil.rmtree(fn.parent)
    assert len(c.results)<len(before)

def test_one_arm_alone_has_an_answer_and_a_report(tmp_path):
    "It said that it expected two arms"
    rows = [dict(arm='A', fold=0, seed=0, case=f'c{i}', subject=f's{i}', structure='x', dice=.5, hd95=3., nsd=.5,
                 volume_mm3=1., target_mm3=1., status='ok') for i in range(4)]
    f = Findings(pd.DataFrame(rows))
    assert f.answer()=='On 4 held-out cases of 4 subjects A reached a mean Dice of 50.0 points.'
    assert f.best().sentence.endswith('what the models cost is not known.')
    assert '4 held-out cases' in f.report(tmp_path/'r.html').read_text(encoding='utf-8')

def test_label_efficiency_refuses_a_table_that_is_cut_off(tmp_path):
    "It went on with the cases that were left"
    df = pd.DataFrame(dict(case=[f'c{i}' for i in range(8)], subject=[f's{i}' for i in range(8)],
                           test=[i<4 for i in range(8)]))
    rows = pd.DataFrame(dict(case=df.case[:4], target=[0,1,0,1], prob_0=[.9,.1,.9,.1], prob_1=[.1,.9,.1,.9],
                             status='ok'))
    def made(d): return Answers(rows)
    def run(): return label_efficiency(df, (2,), repeats=1, make=made, budget=dict(updates=1), valid_col='test',
                                       path=tmp_path/'e')
    assert run().summary().score.item()==1
    fn, = (tmp_path/'e').glob('scratch*.csv')
    fn.write_bytes(fn.read_bytes()[:-30])
    with pytest.raises(ValueError, match='is not what this run wrote'): run()

def test_alpha_counts_for_tables_too():
    "It was accepted and not used"
    rng = np.random.default_rng(0)
    a,b = [pd.DataFrame(rng.normal(size=(12,2)), columns=['x','y']) for _ in range(2)]
    usual,strict = [paired_comparison(a, b, n_boot=100, alpha=o).detectable for o in (.05,.01)]
    assert (strict>usual).all()

def test_two_losses_are_two_settings():
    "Weights are buffers: the results of one weight were taken for those of another"
    from fastai.losses import CrossEntropyLossFlat

    from fastmed.all import DiceCELoss
    from fastmed.study.arms import setting_text
    w = torch.tensor([1.,5.,5.])
    losses = [DiceCELoss(), DiceCELoss(weight=w), DiceCELoss(weight=2*w), torch.nn.CrossEntropyLoss(),
              torch.nn.CrossEntropyLoss(weight=w), CrossEntropyLossFlat(), CrossEntropyLossFlat(weight=w),
              CrossEntropyLossFlat(label_smoothing=.3)]
    said = [setting_text(o) for o in losses]
    assert len(set(said))==len(said) and setting_text(DiceCELoss(weight=w))==said[1], said
    assert setting_text([w])!=setting_text([2*w])

def test_numbers_of_label_efficiency_stay():
    "Scores and spread to the digit, as version 0.1.0 gave them, within intervals of few subjects"
    t = pd.DataFrame([dict(init=i, size=5, repeat=r, case=f'c{c}', subject=f's{c//2}', target='ab'[c%2], pred='a',
                           prob_a=1-p, prob_b=p, status='ok')
                      for i in ('scratch','better') for r in range(2) for c in range(20)
                      for p in [((c%2)*(.9 if i=='better' else .1)+(c*7%20)/20)/2]])
    e = LabelEfficiency(t, n_boot=200)
    found = e.summary().set_index('init').loc['scratch', ['score','low','high']].tolist()
    assert found==pytest.approx([.64,.298063086634,.942984228341], abs=1e-12)
    assert e.gain()[['gain','low','high']].values[0]==pytest.approx([.36,.057015771659,.701936913366], abs=1e-12)
    rows = [dict(init='scratch', size=5, repeat=r, case=f'c{i}', subject=f's{i//2}', structure=s,
                 dice=.8+.01*i+.003*r, status='ok') for i in range(6) for r in (0,1) for s in 'xy']
    rows[0].update(dice=np.nan, status='error: gone')
    found = LabelEfficiency(pd.DataFrame(rows), n_boot=100).summary()[['score','low','high','sd']].values[0]
    assert found==pytest.approx([.793166666667,.7065,.8465,.049261772423], abs=1e-12)

def test_label_efficiency_draws_its_intervals_at_once(monkeypatch):
    "scikit-learn was called anew in every draw: 16 s a start, of 22 cases"
    import sklearn.metrics
    calls = []
    monkeypatch.setattr(sklearn.metrics, 'roc_auc_score', lambda *a, was=sklearn.metrics.roc_auc_score, **k:
                        calls.append(1) or was(*a, **k))
    rng = np.random.default_rng(0)
    t = pd.DataFrame([dict(init='scratch', size=5, repeat=0, case=f'c{c}', subject=f's{c//2}', target='abc'[c%3],
                           pred='a', status='ok', **dict(zip(['prob_a','prob_b','prob_c'], rng.dirichlet([1,1,1]))))
                      for c in range(18)])
    t.loc[4, ['prob_a','prob_b','prob_c']] = np.nan
    r = LabelEfficiency(t, n_boot=100).summary().iloc[0]
    assert len(calls)<=3 and 0<=r.low<r.score<r.high<=1
    known = t.drop(index=4)
    assert r.score==pytest.approx(np.mean([roc_auc(pred=known[f'prob_{k}'], targ=(known.target==k).astype(int))
                                           for k in 'abc']), abs=1e-12)

def _edited(name, edit):
    def go(run):
        t = pd.read_csv(run/name)
        edit(t).to_csv(run/name, index=False)
    return go

def _other_cost(run):
    notes = json.loads((run/'run.json').read_text())
    (run/'run.json').write_text(json.dumps(dict(notes, cost=dict(notes['cost'], predict_s=0.))))

@pytest.mark.parametrize('name,doctor,ask', [
    ('results.csv', _edited('results.csv', lambda t: t.assign(dice=.99)), lambda c: c.summary()),
    ('results.csv', _edited('results.csv', lambda t: t.assign(dice=float('nan'))), lambda c: c.results),
    ('results.csv', _edited('results.csv', lambda t: t.assign(subject='one')), lambda c: c.paired()),
    ('results.csv', _edited('results.csv', lambda t: t.drop(columns='dice')), lambda c: c.best()),
    ('slices.csv', _edited('slices.csv', lambda t: t[t.case!=t.case[0]]), lambda c: c.slices),
    ('remedied.csv', _edited('remedied.csv', lambda t: t.assign(dice=3.)), lambda c: c.remedied),
    ('model.safetensors', lambda run: shutil.copy(run.parent/'2D, fold 0, seed 0/model.safetensors', run),
     lambda c: c.learner('3D')),
    ('run.json', _other_cost, lambda c: c.cost)])
def test_what_a_finished_run_did_not_write_is_noticed(study, whole, tmp_path, name, doctor, ask):
    "Scores or a model that somebody put in the place of those of a run do not stand for it"
    c = make(study, tmp_path)
    shutil.copytree(whole.path, c.path)
    ask(c)
    doctor(c.path/'3D, fold 0, seed 0')
    with pytest.raises(ValueError, match=f'3D, fold 0, seed 0/{name}'): ask(c)


# ---- the page that a reviewer reads

def study_table(arms=('3D','2D $slices^{'), structures=('a long name of a $structure','b'), seed=0):
    "Results of 24 cases of 12 subjects, one structure missed once; and what stands beside them"
    rng,rows = np.random.default_rng(seed),[]
    for i,a in enumerate(arms):
        for c in range(24):
            for s in structures:
                dice,hd,status = .88-.02*i+.02*np.sin(c)+rng.normal(0, .01),2+rng.uniform(),'ok'
                if i and c==3 and s!='b': dice,hd,status = 0.,np.inf,'missed'
                rows.append(dict(arm=a, fold=c%3, seed=0, case=f'c{c:02d}', subject=f's{c//2}', structure=s, dice=dice,
                                 hd95=hd, nsd=dice, volume_mm3=900*dice, target_mm3=900+c*20., diagonal_mm=80.,
                                 status=status))
    df = pd.DataFrame(dict(case=[f'c{c:02d}' for c in range(25)], site=['A','B','C','A','B']*5))
    cost = pd.DataFrame([dict(arm=a, fold=0, seed=0, parameters=5e6, case_gflops=9., train_s=60.) for a in arms])
    logs = pd.concat([pd.DataFrame(dict(arm=a, fold=0, seed=0, update=range(50), loss=np.exp(-np.arange(50)/30)))
                      for a in arms])
    return pd.DataFrame(rows),dict(df=df, cost=cost, logs=logs)

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    results,beside = study_table()
    fn = tmp_path_factory.mktemp('page')/'r.html'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        Findings(results, **beside).report(fn, pictures=0)
    text = re.sub(r'src="data:[^"]*"', '', fn.read_text(encoding='utf-8'))
    return html.unescape(re.sub(r'<style>.*?</style>', '', text, flags=re.S))

def test_a_name_with_a_dollar_is_shown_as_it_is(page):
    "Two dollar signs were a formula, and one that cannot be read ended the report"
    assert '2D $slices^{' in page and 'a long name of a $structure' in page

def test_the_report_says_what_a_reviewer_asks(page):
    for said in ('cases found','not predicted yet','structure missed','fastmed ','torch ','GPU',
                 'hash of cases and subjects','date of this report','Learning curves','Subgroups',
                 'size of the structures, ml','site',
                 'Surface Dice (NSD) within 1 mm, points','Distance of surfaces (HD95), mm','smallest detectable',
                 'better / equal / worse','Which cases the models were trained on is not known here'):
        assert said in page, said
    flow = r'<td>25</td>\s*<td>1</td>\s*<td>0</td>\s*<td>1</td>'
    assert re.search(flow, page), 'found, not predicted, failed, missed'

def test_the_report_speaks_of_models(page):
    "The words of a clinician: no arm, no remedy, no nought, no column of the table of costs"
    for word in (r'\barms?\b', 'remed', 'nought', 'case_gflops', 'train_s', 'p_holm'):
        assert not re.search(word, page, re.I), word
    assert 'computation a case, 10⁹ operations' in page

def test_each_section_begins_with_a_sentence(tmp_path):
    "The sentence first, then the picture and what it shows, then the table"
    from fastmed.study.report import _score_sections
    results,beside = study_table()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for blocks in _score_sections(Findings(results, **beside)).values():
            kinds = ''.join('figure' if hasattr(o, 'savefig') else type(o).__name__ for o in blocks)
            assert re.fullmatch('(str)?(figure)?(str)?(DataFrame)*', kinds), kinds
    import matplotlib.pyplot as plt
    plt.close('all')

def test_p_values_are_printed_as_in_papers():
    from fastmed.plot import printed_p
    assert [printed_p(o) for o in (3e-9, .0372, 1., np.nan)]==['< 0.001','0.037','1.000','–']

def test_order_of_rows_changes_no_digit():
    "Tables, answer and method, of rows in any order"
    results,_ = study_table()
    other = results.sample(frac=1, random_state=1)
    other['arm'] = pd.Categorical(other.arm, ['3D','2D $slices^{'])
    other = other.sort_values('arm', kind='stable').assign(arm=lambda t: t.arm.astype(str))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a,b = Findings(results),Findings(other)
        for score in ('dice','nsd','hd95'):
            for one,two in ((a.summary(score), b.summary(score)), (a.paired(score), b.paired(score))):
                pd.testing.assert_frame_equal(one, two.loc[one.index], check_exact=True)
        assert (a.answer(), a.methods(), a.best().sentence)==(b.answer(), b.methods(), b.best().sentence)

def test_hd95_is_won_by_the_smaller():
    "`win` counted the larger distance; and who missed a structure did not lose"
    results,_ = study_table()
    t = Findings(results).paired('hd95').xs('a long name of a $structure', level='structure').iloc[0]
    assert t['mean']<-2 and t.win>=1 and t.win+t.loss+t.tie==24
    w = common_scores(results, 'hd95')
    assert w.loc[('c03','a long name of a $structure'), '2D $slices^{']==80
