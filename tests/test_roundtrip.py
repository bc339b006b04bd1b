"""There and back, whatever a NIfTI can hold: 1 to 70 voxels an axis, the 48 orientations, 0.2 to 8 mm, any rotation,
every data type, either byte order, scaled or not.

**The bound.** s is the scan's spacing along an axis, t the pipeline's. A voxel is *sure* where the voxels around it
decide its label alone, however the two grids lie against each other:

- `nearest`: the way back takes the label of the pipeline voxel whose centre is nearest, at most t/2 away, and at the
border at most 3t/4 - s/2, because whole pipeline voxels may leave up to t/4 of the box free at
  either end; that voxel took the label of the scan voxel at most s/2 from it. So a voxel is sure where all voxels
  within ⌊max((t/s+1)/2, 3t/4s)⌋ along each axis have its label. With t < s that is the voxel itself: the
  mask comes back **exactly**.
- `smooth`: the way back weighs the pipeline voxels less than t away, each of which weighed scan voxels less than s from
it. So a voxel is sure where all voxels within ⌈t/s⌉ have its label.
  And where t ≤ s along one axis and the neighbourhood changes along this axis alone (a flat border), the nearest
  pipeline voxel, at most t/2 ≤ s/2 away, weighs its own scan voxel more than half, and is itself weighed
  at least half: flat borders come back exactly too. Only voxels at a bend of a border can change.

Let A be the structure, E ⊆ A its sure voxels, D ⊇ A all voxels that are not sure to lie outside it. Then E ⊆ B ⊆ D for
the B that comes back, whatever the grids, and the worst such B, E ∪ (D∖A), gives

    Dice ≥ 2|E| / (|E|+|D|)        (1 where E = A = D: everything is sure)

For a cuboid n voxels thick in pipeline voxels of any size this is near (1-2/n)³ / ((1-2/n)³ + (1+2/n)³) · 2; a line
thinner than one pipeline voxel may vanish, and the bound then says 0, as it must.
What is lost in truth is far less than the bound allows; `benchmarks/roundtrip.py` measures it. Below, balls of at least
`FLOOR` pipeline voxels radius must also keep the Dice given there.

`FASTMED_EXAMPLES=2000` runs that many examples of each, drawn anew each time; without it a fixed draw is run."""
import copy
import itertools
import math
import os
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter

from fastmed.core import FastmedError, TensorVolume, spacing_of
from fastmed.data.preprocess import Preprocess
from fastmed.io.volumes import load_mask, load_volume, read_header, same_grid, save_volume

MANY = int(os.environ.get('FASTMED_EXAMPLES', 0))
def examples(n):
    return settings(max_examples=MANY or n, derandomize=not MANY, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))

AXCODES = [''.join(p) for c in itertools.product('LR','AP','SI') for p in itertools.permutations(c)]
CODES = ['background','a','b','c']
# of the pipeline's grid, at most: each example stays small
VOXELS = 300_000
# radius of a ball in pipeline voxels (the coarser of both grids), and the Dice that it keeps
FLOOR = ((3, .80), (5, .88), (8, .93))
# nibabel writes float128 on no Intel machine, and reads none there: refused
TYPES = ['u1','i1','u2','i2','u4','i4','u8','i8','f4','f8']

# ---- what is drawn

def rotation(a, b, c):
    "(3,3) turn about z, then x, then z"
    def z(t): return np.array([[np.cos(t),-np.sin(t),0],[np.sin(t),np.cos(t),0],[0,0,1]])
    return z(a)@np.array([[1,0,0],[0,np.cos(b),-np.sin(b)],[0,np.sin(b),np.cos(b)]])@z(c)

def affine_of(code, spacing, turn, origin):
    "(4,4) of this orientation and spacing, turned"
    inv = nib.orientations.inv_ornt_aff(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt('RAS'),
            nib.orientations.axcodes2ornt(code)), (1,1,1))
    a = np.eye(4)
    a[:3,:3] = rotation(*turn)@inv[:3,:3]@np.diag(spacing)
    a[:3,3] = origin
    return a

def logs(lo, hi): return st.floats(math.log(lo), math.log(hi)).map(math.exp)

@st.composite
def grids(draw, most=70):
    "(shape, affine): the scan's own"
    turn = draw(st.one_of(st.just((0,0,0)), st.tuples(*[st.floats(-.4,.4)]*3), st.tuples(*[st.floats(-3.1,3.1)]*3)))
    return draw(st.tuples(*[st.integers(1,most)]*3)), affine_of(draw(st.sampled_from(AXCODES)),
                                                                draw(st.tuples(*[logs(.2,8)]*3)), turn,
                                                                draw(st.tuples(*[st.floats(-300,300)]*3)))

@st.composite
def targets(draw, shape, affine):
    "The pipeline's spacing, mm: equal, finer or coarser on each axis, or one for all"
    s = np.array(spacing_of(Preprocess().oriented(shape, affine)[1]))
    how = draw(st.sampled_from(('any','finer','coarser','one')))
    t = np.full(3,
                draw(logs(.2,8))) if how=='one' else s*[
            draw(logs(*dict(any=(1/5,8), finer=(1/5,1), coarser=(1,10))[how])) for _ in range(3)]
    n = np.array(Preprocess().oriented(shape, affine)[0])
    return tuple(float(o) for o in t*max(1, (np.prod(np.maximum(1, n*s/t))/VOXELS)**(1/3)))

@st.composite
def labels(draw, shape):
    "(X,Y,Z) uint8 of up to four labels: bodies, noise, ragged noise, slabs, one voxel, all one"
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    how = draw(st.sampled_from(('bodies','bodies','slabs','ragged','noise','voxel','ones','nothing')))
    a = np.zeros(shape, np.uint8)
    if how=='ones': a[:] = 1
    elif how=='noise': a[:] = rng.integers(0, 4, shape)
    elif how=='voxel': a[tuple(int(rng.integers(n)) for n in shape)] = 2
    elif how=='ragged':
        a[:] = np.digitize(gaussian_filter(rng.standard_normal(shape), rng.uniform(.5,4), mode='nearest').ravel(),
                                           [0,.05,.1]).reshape(shape)
    elif how=='slabs':
        k = int(rng.integers(3))
        w = int(rng.integers(1, 9))
        a[:] = ((np.arange(shape[k])//w)%4).reshape([-1 if i==k else 1 for i in range(3)])
    elif how=='bodies':
        xs = np.ogrid[tuple(slice(0,n) for n in shape)]
        for v in (1,2,3):
            c,r = rng.uniform(0, shape),np.maximum(.6, rng.uniform(.1,.5)*np.array(shape))
            a[sum(((x-o)/q)**2 for x,o,q in zip(xs, c, r))<=1] = v
    return a

kinds = st.tuples(st.sampled_from(TYPES), st.sampled_from('<>'), st.sampled_from((None,(1,0),(.5,-3),(4,0),(-1,0))),
        st.sampled_from(('.nii','.nii','.nii.gz','.hdr','n2')))

def write(a, affine, fn, kind):
    """Write physical values `a` as a NIfTI of this type, byte order, scale and layout; the path, or None where the type
    cannot hold them"""
    dt,order,scale,layout = kind
    cls = {'n2':nib.Nifti2Image, '.hdr':nib.Nifti1Pair}.get(layout, nib.Nifti1Image)
    hdr = cls.header_class(endianness=order)
    slope,inter = scale or (1,0)
    stored = (np.asarray(a, dtype=np.float64)-inter)/slope
    d = np.dtype(dt)
    if d.kind!='f' and (not np.array_equal(stored, np.round(stored)) or stored.min()<np.iinfo(d).min
                        or stored.max()>np.iinfo(d).max):
        return None
    hdr.set_data_dtype(d)
    im = cls(stored.astype(d), affine, header=hdr, dtype=d)
    fn = fn.with_name(fn.name+('.nii' if layout=='n2' else layout))
    if scale is not None:
        nib.save(im, fn)
        scl(fn.with_suffix('.hdr') if layout=='.hdr' else fn, order, slope, inter, layout)
    else: nib.save(im, fn)
    return fn

def scl(fn, order, slope, inter, layout):
    "Set scl_slope and scl_inter of a header on disk"
    import gzip
    import struct
    b = bytearray(gzip.decompress(fn.read_bytes()) if fn.name.endswith('.gz') else fn.read_bytes())
    at,f = (176,'d') if layout=='n2' else (112,'f')
    struct.pack_into(f'{order}2{f}', b, at, slope, inter)
    fn.write_bytes(gzip.compress(bytes(b), 1) if fn.name.endswith('.gz') else bytes(b))

# ---- the bound

def sure(a, ratio, order):
    "Voxels that must keep their label: see the top of this file. `ratio` is t/s along each axis of `a`"
    r = [1 if abs(o-1)<1e-3 else o for o in ratio]                  # there the axis stays as it is
    if all(o==1 for o in r): return np.ones(a.shape, bool)
    def reach(o): return math.floor(max((o+1)/2, .75*o)+1e-9) if order=='nearest' else math.ceil(o)
    k = [0 if o==1 else reach(o) for o in r]
    def flat(size): return maximum_filter(a, size, mode='nearest')==minimum_filter(a, size, mode='nearest')
    res = flat([2*o+1 for o in k])
    if order=='smooth':
        for i in range(3):
            if r[i]<=1:
                res |= minimum_filter(flat([1 if j==i else 2*o+1 for j,o in enumerate(k)]),
                                      [3 if j==i else 1 for j in range(3)], mode='nearest')
    return res

def dice(a, b):
    n = a.sum()+b.sum()
    return 2*(a&b).sum()/n if n else 1.

def bounded(a, b, ratio, order):
    """Check that `b` keeps the bound against `a`; (least Dice, its bound) over the structures of `a`, (1,1) where there
    is none"""
    ok,least = sure(a, ratio, order),(1.,1.)
    assert (a==b)[ok].all(), f'{int((a!=b)[ok].sum())} voxels changed that could not, of {ok.sum()} sure ones'
    for v in np.unique(a)[np.unique(a)>0]:
        A,B = a==v,b==v
        E,D = A&ok,A|~ok
        d,bound = dice(A,B),2*E.sum()/(E.sum()+D.sum())
        assert d>=bound-1e-12
        least = min(least, (float(d),float(bound)))
    return least

def ratios(shape, affine, pre):
    "t/s along each axis of the scan, in its own order"
    s,a = pre.oriented(shape, affine)
    r = np.array(spacing_of(pre.grid(shape, affine)[1]))/np.array(spacing_of(a))
    # array axis → world axis = pipeline axis
    back = nib.orientations.io_orientation(affine)[:,0].astype(int)
    return [float(r[i]) for i in back] if pre.orientation else r.tolist()

def there_and_back(a, affine, mm, kind, order, folder):
    """Write, load, preprocess, go back; what is wrong raises; (ratios, least Dice, bound), or None where the type
    cannot hold the labels"""
    fn = write(a, affine, Path(folder)/'m', kind)
    if fn is None: return
    m,h = load_mask(fn),read_header(fn)
    assert np.array_equal(m.numpy(), a) and tuple(h['shape'])==a.shape and np.array_equal(h['affine'],
            m.affine) and np.allclose(m.affine, affine, atol=1e-4, rtol=1e-5)
    assert np.array_equal(load_volume(fn)[0].numpy(), a.astype(np.float32))
    pre = Preprocess(spacing=mm, codes=CODES, mask_order=order)
    p = pre(m)
    assert p.orientation=='RAS' and set(np.unique(p.numpy()))<=set(np.unique(a)) and same_grid(p.shape, p.affine,
            *pre.grid(a.shape, m.affine))
    back = pre.inverse(p, m.shape, m.affine)
    assert tuple(back.shape)==a.shape and np.array_equal(back.affine, m.affine) and back.dtype==torch.uint8
    b,r = back.numpy(),ratios(a.shape, m.affine, pre)
    if (a==a.flat[0]).all() or mm is None: assert np.array_equal(a, b)
    out = load_mask(save_volume(back, Path(folder)/'out.nii.gz'))
    assert np.array_equal(out.numpy(), b) and np.allclose(out.affine, affine, atol=1e-4, rtol=1e-5)
    return r,*bounded(a, b, r, order)

# ---- the tests

def drawn(draw):
    "A scan's mask, its affine, the pipeline's spacing, the type on disk and the order of resampling"
    shape,aff = draw(grids())
    a = draw(labels(shape))
    return a,aff,draw(st.one_of(st.none(), targets(shape, aff), targets(shape, aff),
            targets(shape, aff))),draw(kinds),draw(st.sampled_from(('smooth','smooth','nearest')))
scans = st.composite(drawn)()

@examples(150)
@given(scans)
def test_a_mask_comes_back_within_its_bound(o):
    with tempfile.TemporaryDirectory() as d: there_and_back(*o, d)

def ball(shape, spacing, radius):
    "(X,Y,Z) uint8: 1 within `radius` mm of the middle"
    xs = np.ogrid[tuple(slice(0,n) for n in shape)]
    return (sum(((x-(n-1)/2)*s)**2 for x,n,s in zip(xs, shape, spacing))<=radius**2).astype(np.uint8)

@st.composite
def balls(draw):
    "A ball of a known number of voxels of the coarser grid, in a box that just holds it"
    aff = draw(grids(1))[1]
    s = np.array(spacing_of(aff))
    R = draw(st.floats(3, 12))
    s = np.clip(s, s.max()/4, None)
    aff[:3,:3] *= s/np.array(spacing_of(aff))
    ratio = np.array([draw(logs(1/4,4)) for _ in range(3)])
    r = R*float(np.max(s*np.maximum(1, ratio)))
    shape = tuple(int(o) for o in np.minimum(70, np.ceil(2*r/s)+3))
    if any(n*o<2*r+2*o for n,o in zip(shape, s)): r = float(min((n-2)*o/2 for n,o in zip(shape, s)))
    back = nib.orientations.io_orientation(aff)[:,0].astype(int)
    t = np.empty(3)
    t[back] = s*ratio
    t = t*max(1, (np.prod(np.array(shape)/ratio)/VOXELS)**(1/3))
    return ball(shape, s, r),aff,tuple(float(o) for o in t),r

@examples(60)
@given(balls())
def test_a_ball_keeps_its_dice(o):
    a,aff,mm,r = o
    with tempfile.TemporaryDirectory() as d: q,got,_ = there_and_back(a, aff, mm, ('u1','<',None,'.nii'), 'smooth', d)
    n = r/max(s*max(1, k) for s,k in zip(spacing_of(aff), q))
    for k,least in FLOOR:
        if n>=k: assert got>=least, (got, n, q)

@examples(60)
@given(grids(40), st.data(), st.floats(-1e6, 1e6, width=32), st.sampled_from(('linear','cubic')),
        st.sampled_from(('none','zscore','nonzero','mean','percentile','minmax','max')))
def test_a_constant_stays_constant(g, data, value, order, how):
    "To 1e-5 of its size; and what normalises it does not blow the rounding up into a picture"
    shape,aff = g
    x = Preprocess(spacing=data.draw(targets(*g)), normalize=how,
                   order=order)(TensorVolume(torch.full((1,*shape), value), affine=aff)).numpy()
    assert np.isfinite(x).all() and np.ptp(x)<=1e-5*max(1, abs(value) if how=='none' else 1), np.ptp(x)
    if how=='none': assert np.allclose(x, value, rtol=1e-5, atol=1e-30)

@examples(40)
@given(grids(40), st.data(), st.integers(0, 2**31))
def test_linear_resampling_adds_no_value_beyond_the_old_ones(g, data, seed):
    shape,aff = g
    a = np.random.default_rng(seed).standard_normal((1,*shape)).astype(np.float32)
    x = Preprocess(spacing=data.draw(targets(*g)), normalize='none')(TensorVolume(torch.from_numpy(a),
                   affine=aff)).numpy()
    assert a.min()-1e-5<=x.min() and x.max()<=a.max()+1e-5

@pytest.mark.parametrize('dt', TYPES)
@pytest.mark.parametrize('order', '<>')
def test_every_type_gives_physical_values(dt, order, tmp_path):
    "The extremes of each type, scaled and not, in each layout"
    for layout,scale in itertools.product(('.nii','.nii.gz','.hdr','n2'), (None,(.5,-3),(-2,7))):
        d = np.dtype(dt)
        lo,hi = (-3e4,3e4) if d.kind=='f' else (max(np.iinfo(d).min, -2**20), min(np.iinfo(d).max, 2**20))
        slope,inter = scale or (1,0)
        a = np.array([lo,hi,0,1,2,3,4,5], np.float64).reshape(2,2,2)*slope+inter
        fn = write(a, np.diag([1,2,3,1.]), tmp_path/'x', (dt,order,scale,layout))
        got = load_volume(fn)
        assert np.array_equal(got[0].numpy(), a.astype(np.float32)) and got.spacing==(1,2,3)
        if scale!=(.5,-3): assert np.array_equal(load_mask(fn).numpy(), a.astype(np.int64))
        else:
            with pytest.raises(FastmedError, match='whole numbers'): load_mask(fn)

@pytest.mark.parametrize('dt,value', [('u4',2**32-1), ('i8',2**40+1), ('u8',2**63+1), ('i8',-2**40), ('f8',3e9),
        ('f4',-2.**35)])
def test_a_label_too_large_is_refused_and_not_wrapped(dt, value, tmp_path):
    nib.save(nib.Nifti1Image(np.full((3,3,3), value, dt), np.eye(4), dtype=np.dtype(dt)), tmp_path/'big.nii')
    with pytest.raises(FastmedError, match='big.nii'): load_mask(tmp_path/'big.nii')

# ---- through a Learner

def with_preprocess(learn, pre):
    "The Learner with another `Preprocess`"
    from fastmed.data.blocks import LoadMask, LoadVolume
    for tl in learn.dls.train_ds.tls:
        for f in tl.tfms.fs:
            if isinstance(f, (LoadVolume,LoadMask)): f.preprocess,f.store = pre,None    # a store keeps its own
    return learn

def predicted(learn, a, aff, mm, order, folder):
    "The mask as an image, through a network that says 1 above one half: (ratios, least Dice, bound)"
    fn = Path(folder)/'x.nii'
    nib.save(nib.Nifti1Image(a.astype(np.float32), aff), fn)
    pre = Preprocess(spacing=mm, normalize='none', codes=['background','a'], mask_order=order)
    m = with_preprocess(learn, pre).predict_volume(fn)
    x = load_volume(fn)
    assert tuple(m.shape)==a.shape and np.array_equal(m.affine, x.affine)
    r = ratios(a.shape, x.affine, pre)
    return r,*bounded(a, m.numpy(), r, 'smooth')                    # 'nearest' on the way back looks less far

@pytest.fixture
def sharp(learner):
    "A Learner whose network needs no training"
    from phantoms import Nearest
    # its preprocessing is changed below; that of the other tests is not
    learn = learner(3)
    learn.model = Nearest(1, 2)
    learn.n_out = 2
    learn.dls = copy.deepcopy(learn.dls)
    return learn

@examples(40)
@given(grids(), st.data())
def test_a_prediction_lies_on_the_scan_s_own_grid_within_the_bound(sharp, g, data):
    a = (data.draw(labels(g[0]))>0).astype(np.uint8)
    with tempfile.TemporaryDirectory() as d:
        predicted(sharp, a, g[1], data.draw(st.one_of(st.none(), targets(*g))),
                data.draw(st.sampled_from(('smooth','nearest'))), d)
