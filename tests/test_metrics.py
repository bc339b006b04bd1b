"Metrics: parity with MONAI, known answers, the rule for empty structures, fastai metrics"
import pickle
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage as ndi

from fastmed.core import TensorVolume, TensorVolumeMask
from fastmed.metrics.masks import *
from fastmed.metrics.masks import DiceCounts
from fastmed.metrics.surfaces import element_areas, mask_surface, neighbour_codes, surface_distances


def blob(seed, size=(18,16,14), t=0.):
    return ndi.gaussian_filter(np.random.default_rng(seed).normal(size=size), 2) > t*.05

def ball(r, c=(0,0,0), n=41, sp=(1.,1.,1.)):
    g = np.meshgrid(*[(np.arange(n)-n//2)*s for s in sp], indexing='ij')
    return sum((a-b)**2 for a,b in zip(g, c))<=r*r

@pytest.mark.parametrize('spacing', [(1.,1.,1.),(.7,.7,5.),(2.,.5,1.3)])
def test_parity_with_monai(spacing):
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
    for s in range(4):
        p,t = blob(s),blob(s+50, t=s/2)
        if s==2: p,t = p&t,t                                    # one inside the other, both at the border of the image
        one = lambda m: torch.tensor(np.stack([~m,m])[None]).float()
        hd = compute_hausdorff_distance(one(p), one(t), percentile=95, spacing=spacing).item()
        assert hausdorff95(p, t, spacing)==pytest.approx(hd, rel=1e-5)
        for tol in (.6,1.,2.5):
            for areas in (False,True):
                ns = compute_surface_dice(one(p), one(t), [tol], spacing=spacing, use_subvoxels=areas).item()
                assert surface_dice(p, t, spacing, tol, use_subvoxels=areas)==pytest.approx(ns, abs=1e-6)
        assert dice_score(p, t)==pytest.approx(compute_dice(one(p), one(t), include_background=False).item(), abs=1e-6)

def test_distance_map_and_search_tree_agree():
    "Small surfaces in a large box go by the tree; the numbers are those of the map"
    p,t = np.zeros((2,60,50,40),bool)
    p[3:9,4:9,5:8] = p[50:55,40:44,30:33] = t[5:12,4:9,5:9] = t[51:54,41:46,33:38] = True
    sp = (.7,1.1,2.3)
    a,b = surface_distances(p, t, sp)
    e,f = mask_surface(p),mask_surface(t)
    assert a.size*20<p.size
    np.testing.assert_allclose(a, ndi.distance_transform_edt(~f, sampling=sp)[e])
    np.testing.assert_allclose(b, ndi.distance_transform_edt(~e, sampling=sp)[f])

def test_parity_with_monai_2d():
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    p,t = blob(1,(30,25)),blob(2,(30,25))
    one = lambda m: torch.tensor(np.stack([~m,m])[None]).float()
    assert hausdorff95(p, t, (.5,2.))==pytest.approx(compute_hausdorff_distance(one(p), one(t), percentile=95,
            spacing=(.5,2.)).item(), rel=1e-5)
    length = compute_surface_dice(one(p), one(t), [1.], spacing=(.5,2.), use_subvoxels=True).item()
    assert surface_dice(p, t, (.5,2.), 1.)==pytest.approx(length, abs=1e-6)

def test_surface_is_erosion_and_border_counts():
    for m in (blob(3), np.ones((4,5,6),bool), blob(1,(9,9))):
        assert (mask_surface(m)==(m & ~ndi.binary_erosion(m))).all()

def test_spheres_have_known_answers():
    a,sp = ball(12),(1,1,1)
    assert volume_mm3(a, sp)==pytest.approx(4/3*np.pi*12**3, rel=.02)
    for d in (3,6):
        b = ball(12, (d,0,0))
        assert dice_score(a, b)==pytest.approx(1-3*d/48+d**3/(16*12**3), abs=.005)
        assert hausdorff95(a, b, sp)==pytest.approx(d, abs=.8)
    assert hausdorff95(a, ball(15), sp)==pytest.approx(3, abs=.8)
    assert surface_dice(a, ball(15), sp, 3.9)==1 and surface_dice(a, ball(15), sp, 2.)<.05
    # moved by 2 voxels of 3 mm
    s = (1.,1.,3.)
    assert hausdorff95(ball(9,sp=s), ball(9,(0,0,6),sp=s), s)==pytest.approx(6, abs=.8)
    assert volume_mm3(ball(9,sp=s), s)==pytest.approx(4/3*np.pi*9**3, rel=.03)

@pytest.mark.parametrize('spacing', [(1.,1.,1.),(.8,1.,3.5),(.84,.84,17.)])
def test_parity_with_deepmind(spacing):
    "Nikolov's own surface-distance, where it is installed: areas of all 256 codes, NSD and the robust HD95"
    theirs = pytest.importorskip('surface_distance')
    from surface_distance import lookup_tables as table
    bits = [int(b) for b in table.ENCODE_NEIGHBOURHOOD_3D_KERNEL.ravel()]          # their order of the corners
    same = [sum(b for k,b in enumerate(bits) if code>>k&1) for code in range(256)]
    np.testing.assert_allclose(element_areas(spacing), table.create_table_neighbour_code_to_surface_area(spacing)[same])
    for s in range(4):
        p,t = blob(s),blob(s+50, t=s/2)
        d = theirs.compute_surface_distances(t, p, spacing)
        for tol in (.6,1.,2.5):
            assert surface_dice(p, t, spacing, tol)==pytest.approx(theirs.compute_surface_dice_at_tolerance(d, tol),
                    abs=1e-9)
        assert hausdorff95(p, t, spacing, use_subvoxels=True)==pytest.approx(theirs.compute_robust_hausdorff(d, 95))

def test_areas_of_surfaces_that_are_known():
    "A voxel is an octahedron, a box of voxels nearly a box; lengths of pixels; the complement has the same surface"
    for sp in ((1.,1.,1.),(1.,1.,5.)):
        octahedron = 8*.5*np.linalg.norm(np.cross(*[np.array([-sp[0],sp[1],0])/2, np.array([-sp[0],0,sp[2]])/2]))
        assert element_areas(sp)[neighbour_codes(np.ones((1,1,1), bool))].sum()==pytest.approx(octahedron)
        box = element_areas(sp)[neighbour_codes(np.ones((40,30,20), bool))].sum()
        flat = 2*(40*30*sp[0]*sp[1]+40*20*sp[0]*sp[2]+30*20*sp[1]*sp[2])
        assert .96*flat<box<flat
        np.testing.assert_allclose(element_areas(sp), element_areas(sp)[::-1])
    assert element_areas((1.,5.))[neighbour_codes(np.ones((1,1), bool))].sum()==pytest.approx(2*26**.5)

def test_thick_slices_do_not_turn_the_order_of_two_models_round():
    "NSD counted voxels: a whole wrong slice weighed as little as its rim, and what was better by area came second"
    t = np.zeros((66,50,13), bool)
    t[3:63,3:47,3:10] = True
    wide,long = t.copy(),t.copy()
    wide[2:64,2:48,3:10] = True
    long[3:63,3:47,10] = True
    by_area = [surface_dice(m, t, (1,1,5), .5) for m in (wide,long)]
    voxels = [surface_dice(m, t, (1,1,5), .5, use_subvoxels=False) for m in (wide,long)]
    assert by_area[0]<by_area[1]-.1 and voxels[0]>voxels[1]+.1, (by_area, voxels)
    row = case_scores(wide.astype(int), t.astype(int), ['b','a'], (1,1,5), .5)[0]
    assert row['nsd']==by_area[0] and row['diagonal_mm']==pytest.approx(np.linalg.norm((66,50,65)))

def test_drawing_nothing_does_not_win():
    "HD95 of a missed structure left the mean: the model that left out what was difficult was ahead"
    t = ball(6, n=24).astype(int)
    off,empty = np.roll(t, 3, 0),np.zeros_like(t)
    def cases(masks):
        return [dict(case=str(i), **r) for i,m in enumerate(masks) for r in case_scores(m, t, ['b','a'], (1,1,2))]
    brave,shy = summarise(cases([t,off]), 'hd95'),summarise(cases([t,empty]), 'hd95')
    assert brave.loc['a','mean']<shy.loc['a','mean'] and shy.loc['a','failed']==1
    assert shy.loc['all','worst']==pytest.approx(np.linalg.norm((24,24,48)))

def test_single_voxels_far_apart():
    p,t = np.zeros((9,9,9),bool),np.zeros((9,9,9),bool)
    p[0,0,0] = t[8,0,8] = True
    assert hausdorff95(p, t, (1,1,2))==pytest.approx(np.hypot(8,16))
    assert [surface_dice(p, t, (1,1,2), o, use_subvoxels=False) for o in (17,18)]==[0,1]
    assert [surface_dice(p, t, (1,1,2), o) for o in (15,20)]==[0,1]              # from corner to corner of the voxels

masks = arrays(bool, (5,4,6))
sps = st.tuples(*[st.floats(.3, 5.)]*3)

@settings(max_examples=40, deadline=None)
@given(masks, masks, sps)
def test_symmetry_and_bounds(p, t, sp):
    d = dice_score(p, t)
    assert np.isnan(d)==(not p.any() and not t.any())
    for f in (dice_score, lambda a,b: hausdorff95(a,b,sp), lambda a,b: surface_dice(a,b,sp)):
        assert f(p,t)==f(t,p) or np.isnan(f(p,t))
    if not np.isnan(d): assert 0<=d<=1 and 0<=surface_dice(p,t,sp)<=1 and hausdorff95(p,t,sp)>=0
    if p.any(): assert (dice_score(p,p),hausdorff95(p,p,sp),surface_dice(p,p,sp,0.))==(1,0,1)

@settings(max_examples=25, deadline=None)
@given(masks, masks, sps, st.tuples(*[st.integers(0,3)]*3))
def test_translation_changes_nothing(p, t, sp, o):
    "Moving both masks together, with background all round"
    put = lambda m, o: np.pad(m, [(1+i,4-i) for i in o])
    a,b = [(put(p,q),put(t,q)) for q in ((0,0,0),o)]
    for f in (dice_score, lambda x,y: hausdorff95(x,y,sp), lambda x,y: surface_dice(x,y,sp)):
        np.testing.assert_allclose(f(*a), f(*b))

@settings(max_examples=25, deadline=None)
@given(arrays(np.uint8, (5,4,6), elements=st.integers(0,3)), arrays(np.uint8, (5,4,6), elements=st.integers(0,3)),
       st.permutations([1,2,3]))
def test_permuting_labels_permutes_scores(p, t, perm):
    lut = np.array([0,*perm],np.uint8)
    codes = ['background','a','b','c']
    names = ['background']+[None]*3
    for k,q in enumerate(perm, 1): names[q] = codes[k]
    a = {r['structure']:r for r in case_scores(p, t, codes, (1,1,2))}
    b = {r['structure']:r for r in case_scores(lut[p], lut[t], names, (1,1,2))}
    pd.testing.assert_frame_equal(pd.DataFrame(a), pd.DataFrame(b)[list(a)])

def test_rule_for_empty_structures():
    z,a = np.zeros((6,6,6),bool),ball(2, n=6)
    assert all(np.isnan(v) for v in (dice_score(z,z),hausdorff95(z,z,(1,1,1)),surface_dice(z,z,(1,1,1))))
    for p,t in ((z,a),(a,z)): assert (dice_score(p,t),hausdorff95(p,t,(1,1,1)),surface_dice(p,t,(1,1,1)))==(0,np.inf,0)

def test_case_scores_equal_the_pure_functions():
    rng = np.random.default_rng(0)
    sp = (1.,.8,2.)
    t = (ndi.gaussian_filter(rng.normal(size=(20,18,16)), 2)*30).clip(0,3).astype('int64')
    p = np.roll(t, 1, 0).astype('uint8')
    for pp,tt in ((p,t), (TensorVolumeMask(torch.tensor(p)),TensorVolumeMask(torch.tensor(t)))):
        for k,r in enumerate(case_scores(pp, tt, ['background','a','b','c'], sp, 1.5), 1):
            a,b = p==k,t==k
            assert r['status']=='ok' and r['dice']==dice_score(a,
                    b) and r['hd95']==pytest.approx(hausdorff95(a,b,sp)) and r['nsd']==pytest.approx(surface_dice(a,b,
                    sp,1.5))
            assert r['volume_mm3']==pytest.approx(volume_mm3(a,sp)) and r['target_mm3']==pytest.approx(volume_mm3(b,sp))
    quick = case_scores(p, t, ['background','a','b','c'], sp, distances=False)
    assert all(np.isnan(r['hd95']) and r['dice']>0 for r in quick)

def test_labels_are_never_binarised():
    "Row 11: label 1 against label 2 is a miss and a false positive, not distance 0"
    t = ball(3, n=10).astype(np.uint8)
    a,b = case_scores(2*t, t, ['background','a','b'], (1,1,1))
    assert (a['status'],b['status'],a['dice'],b['dice'],a['hd95'])==('missed','false positive',0,0,np.inf)
    for f in (lambda: dice_score(2*t, t), lambda: hausdorff95(2*t, t, (1,1,1)), lambda: surface_dice(t, t*.5, (1,1,1)),
              lambda: volume_mm3(3*t, (1,1,1))):
        with pytest.raises(ValueError, match='one structure'): f()

def test_case_scores_status_and_ignore():
    z = np.zeros((6,6,6),np.uint8)
    t = z.copy()
    t[:3] = 1
    t[5] = 255
    rows = case_scores(t*(t<2), t, ['background','a','b'], (1,1,1), ignore_index=255)
    assert [r['status'] for r in rows]==['ok','empty'] and rows[0]['dice']==1
    p = t*(t<2)
    p[5] = 1
    assert case_scores(p, t, ['background','a'], (1,1,1), ignore_index=255)[0]['dice']==1
    with pytest.raises(ValueError, match='targ holds the values .*255'): case_scores(p, t, ['background','a'], (1,1,1))

def test_refusals():
    a = ball(2, n=6)
    for f in (lambda q: dice_score(a,q), lambda q: hausdorff95(a,q,(1,1,1)),
            lambda q: case_scores(a*1,q*1,['b','x'],(1,1,1))):
        with pytest.raises(ValueError, match='(?s)shape.*(6, 6, 6)'): f(a[:-1])
    for sp in ((1,1),(1,1,0),(1,1,float('nan'))):
        with pytest.raises(ValueError, match='spacing'): hausdorff95(a, a, sp)
    with pytest.raises(ValueError, match='tolerance'): surface_dice(a, a, (1,1,1), -1)
    with pytest.raises(ValueError, match='class ids'): case_scores(a*.5, a*1, ['b','x'], (1,1,1))
    with pytest.raises(ValueError, match='empty'): surface_distances(a, a&False, (1,1,1))

def test_summary_counts_failures():
    "Row 14: a missed structure counts with the diagonal of its image, and the summary says how many failed"
    mk = lambda c,s,d,h,stt: dict(case=c, structure=s, dice=d, hd95=h, nsd=d, volume_mm3=1., target_mm3=1., status=stt)
    df = pd.DataFrame([mk('1','a',.9,2.,'ok'),mk('1','b',.8,4.,'ok'),mk('2','a',0.,np.inf,'missed'),
            mk('2','b',.6,6.,'ok'),mk('3','a',0.,np.inf,'false positive'),mk('3','b',np.nan,np.nan,'empty')])
    s = summarise(df)
    assert list(s.columns)==['mean','sd','median','worst','n','failed','empty'] and list(s.index)==['a','b','all']
    assert s.loc['a','mean']==pytest.approx(.3) and s.loc['a','failed']==2 and s.loc['b','empty']==1 and s.loc['b',
            'mean']==pytest.approx(.7) and s.loc['b','n']==3
    assert s.loc['all','mean']==pytest.approx((.85+.3+0)/3) and s.loc['all','n']==3 and s.loc['all','failed']==2
    h = summarise(df.assign(diagonal_mm=[30.,30.,40.,40.,50.,50.]),'hd95')
    assert h.loc['a','mean']==pytest.approx((2+40+50)/3) and h.loc['a','failed']==2 and h.loc['b','worst']==6
    assert h.loc['all','mean']==pytest.approx((3+23+50)/3)
    assert summarise(df,'hd95').loc['a','mean']==pytest.approx((2+6+6)/3)           # of tables without diagonals
    lost = dict(mk('4','a',np.nan,np.nan,'error: no such file'))
    s = summarise(pd.concat([df, pd.DataFrame([lost])]))
    assert s.loc['a','mean']==pytest.approx(.9/4) and s.loc['a','failed']==3 and s.loc['all','n']==4
    with pytest.raises(ValueError, match='score'): summarise(df, 'iou')
    with pytest.raises(ValueError, match='lack'): summarise(df.drop(columns='status'))

# --- fastai metrics

def learn(pred, yb): return SimpleNamespace(pred=pred, yb=(yb,))
def run(ms, batches):
    for m in ms: m.reset()
    for p,y in batches:
        for m in ms: m.accumulate(learn(p,y))
    return [m.value for m in ms]

def batches(C=4, n=3, dtype=torch.int64, size=(6,7,5), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(2,C,*size,generator=g), torch.randint(0,C,(2,*size),generator=g).to(dtype)) for _ in range(n)]

@pytest.mark.parametrize('size', [(6,7,5),(9,8)])
@pytest.mark.parametrize('dtype', [torch.uint8,torch.int64])
def test_metric_is_dice_over_all_patches(size, dtype):
    bs = batches(size=size, dtype=dtype)
    got = run(dice_metrics(['background','a','b','c']), bs)
    p,t = torch.cat([p.argmax(1) for p,_ in bs]).flatten().numpy(),torch.cat([y for _,y in bs]).flatten().numpy()
    want = [dice_score(p==k, t==k) for k in (1,2,3)]
    assert got==pytest.approx([*want, np.mean(want)])

def test_each_batch_is_counted_once(monkeypatch):
    ms = dice_metrics(['background','a','b','c'])
    calls = []
    f = DiceCounts.add
    monkeypatch.setattr(DiceCounts, 'add', lambda self,*a: (calls.append(1), f(self,*a))[1])
    assert run(ms, batches()) == run(ms[:1], batches())[:1]+run(ms, batches())[1:]
    assert len(calls)==9
    assert run(ms[-1:], batches())==run(ms, batches())[-1:]         # one of a list works by itself
    assert run(ms[::-1], batches())==run(ms, batches())[::-1]

def test_reset_forgets_and_lists_are_apart():
    a,b = dice_metrics(['background','x']),dice_metrics(['background','x'])
    v = run(a, batches(2))
    run(a, batches(2, seed=5))
    assert run(a, batches(2))==v
    assert np.isnan(b[0].value)                                         # nothing seen yet, nothing shared
    assert run(b, batches(2, n=1))!=v and [m.value for m in a]==v

def test_one_channel_sigmoid():
    "Row 9: a perfect one-channel prediction has Dice 1"
    y = (torch.rand(2,6,6,6)>.5).to(torch.uint8)
    assert run(dice_metrics(['background','x']), [((y.float()*2-1)[:,None]*3, y)])==[1,1]
    assert run(dice_metrics(['background','x']), [((1-y.float()*2)[:,None]*3, y)])==[0,0]

def test_deep_supervision_types_halves_and_channel_axis():
    bs = batches(3)
    want = run(dice_metrics('bab'), bs)
    ms = dice_metrics('bab')
    assert run(ms, [([p, p[...,::2]], y) for p,y in bs])==want
    assert run(ms, [(TensorVolume(p), TensorVolumeMask(y)) for p,y in bs])==want
    assert run(ms, [(p, y[:,None]) for p,y in bs])==want
    assert run(ms, [(p.contiguous(memory_format=torch.channels_last_3d), y) for p,y in bs])==want
    assert run(ms, [(p.to(torch.bfloat16), y) for p,y in bs])==pytest.approx(want, abs=.02)
    assert run(ms, [(p.requires_grad_(), y) for p,y in bs])==want

def test_structure_that_never_occurs_is_nan():
    p = torch.zeros(1,4,5,5)
    p[:,1] = 1
    y = torch.ones(1,5,5,dtype=torch.long)
    v = run(dice_metrics(['background','a','b','c']), [(p,y)])
    assert v[0]==1 and np.isnan(v[1]) and np.isnan(v[2]) and v[3]==1
    # predicted, never there: 0
    v = run(dice_metrics(['background','a','b','c']), [(p, y*2)])
    assert v[:2]==[0,0] and np.isnan(v[2]) and v[3]==0

def test_bad_ids_and_ignore():
    (p,y), = batches(3, 1)
    y[0,0] = 255
    with pytest.raises(ValueError, match='255'): run(dice_metrics('bab'), [(p,y)])
    v = run(dice_metrics('bab', ignore_index=255), [(p,y)])
    k = y!=255
    q = p.argmax(1)[k].numpy()
    t = y[k].numpy()
    assert v[:2]==pytest.approx([dice_score(q==i, t==i) for i in (1,2)])
    y[0,0] = -1
    with pytest.raises(ValueError, match='-1'): run(dice_metrics('bab'), [(p,y)])
    with pytest.raises(ValueError, match='grid'): run(dice_metrics('bab'), [(p,y[:,:-1])])
    with pytest.raises(ValueError, match='classes'): run([DiceScore(7)], batches(3,1))

def test_names():
    assert [m.name for m in dice_metrics(['background','Anterior','Grey matter (left)','grey_matter_left','++',
            'Größe'])]==['dice_anterior','dice_grey_matter_left','dice_grey_matter_left_3','dice_4','dice_größe','dice']
    assert (DiceScore(2).name, DiceScore().name, DiceScore(1,'mine').name)==('dice_2','dice','mine')

def test_pickle_keeps_the_sharing():
    ms = pickle.loads(pickle.dumps(dice_metrics(['background','a','b','c'])))
    assert len({id(m.counts) for m in ms})==1
    assert run(ms, batches())==run(dice_metrics(['background','a','b','c']), batches())

def test_in_a_learner():
    "The columns of the training table, and `monitor` by name"
    import fastai.callback.progress  # noqa: F401, gives `no_bar`
    from fastai.callback.tracker import TrackerCallback
    from fastai.data.all import DataLoaders
    from fastai.learner import Learner
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0,3,(8,6,6),generator=g)
    x = torch.nn.functional.one_hot(y,3).movedim(-1,1).float()+torch.randn(8,3,6,6,generator=g)
    ds = list(zip(x,y))
    dls = DataLoaders.from_dsets(ds, ds, bs=4, device='cpu', num_workers=0)
    l = Learner(dls, torch.nn.Conv2d(3,3,1), loss_func=torch.nn.CrossEntropyLoss(),
            metrics=dice_metrics(['background','A b','c']))
    cb = TrackerCallback(monitor='dice_a_b')
    with l.no_bar(), l.no_logging(): l.fit(2, 1e-1, cbs=cb)
    assert list(l.recorder.metric_names)[3:6]==['dice_a_b','dice_c',
                                                'dice'] and cb.best==pytest.approx(max(v[2] for v in l.recorder.values))
    last = list(l.recorder.values[-1][2:])
    with l.no_bar(): assert list(l.validate())[1:]==pytest.approx(last)
