"There and back: any shape, orientation, spacing and oblique affine, and scans that are no NIfTI."
import itertools

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import strategies as st
from sweeps import swept

from fastmed.all import (
    InputError,
    Preprocess,
    SliceDataLoaders,
    TensorVolume,
    TensorVolumeMask,
    VolumeDataLoaders,
    load_mask,
    load_volume,
    plot_volume,
    resample_to,
    save_volume,
    unet2d_learner,
)
from fastmed.io.volumes import same_grid

axcodes = [''.join(p) for c in itertools.product('LR','AP','SI') for p in itertools.permutations(c)]

def affine(code, spacing, angle, origin):
    "An affine of this orientation and spacing (mm), turned by `angle` about two axes"
    c,s = np.cos(angle),np.sin(angle)
    R = np.array([[c,-s,0],[s,c,0],[0,0,1]]) @ np.array([[1,0,0],[0,c,-s],[0,s,c]])
    inv = nib.orientations.inv_ornt_aff(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt('RAS'),
            nib.orientations.axcodes2ornt(code)), (1,1,1))
    a = np.eye(4)
    a[:3,:3] = R @ inv[:3,:3] @ np.diag(spacing)
    a[:3,3] = origin
    return a

grids = st.tuples(st.sampled_from(axcodes), st.tuples(*[st.floats(.2,8)]*3), st.floats(0,.5),
                  st.tuples(*[st.floats(-200,200)]*3), st.tuples(*[st.integers(1,40)]*3))

@swept(40, 150, grids, st.integers(0, 2**31))
def test_without_resampling_the_way_back_is_exact(g, seed):
    code,sp,ang,org,shape = g
    aff = affine(code, sp, ang, org)
    m = TensorVolumeMask(torch.from_numpy(np.random.default_rng(seed).integers(0, 3, shape).astype(np.int32)),
                         affine=aff)
    pre = Preprocess(codes=['background','a','b'])
    there = pre(m)
    assert there.orientation=='RAS'
    back = pre.inverse(there, m.shape, m.affine)
    assert (back.numpy()==m.numpy()).all() and np.allclose(back.affine, aff)

@swept(30, 150, grids, st.floats(.5, 4))
def test_a_resampled_mask_comes_back_to_its_own_grid(g, mm):
    """A ball of 3.5 of the larger voxels radius comes back with a Dice above 0.7. The bound: half a voxel of its border
    is 0.37 of the volume, and a Dice of 0.7 is a ball that lost 0.46 of it, or gained 0.86"""
    code,sp,ang,org,shape = g
    sp = np.clip(sp, .5, 3)
    shape = np.maximum(shape, np.ceil(10*max(mm, sp.max())/sp).astype(int))
    if np.prod(shape)>400_000: return
    aff = affine(code, sp, ang, org)
    idx = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing='ij'), -1)
    r = np.linalg.norm((idx-(np.array(shape)-1)/2)*sp, axis=-1)
    m = TensorVolumeMask(torch.from_numpy((r<=3.5*max(mm, sp.max())).astype(np.int32)), affine=aff)
    pre = Preprocess(spacing=mm, codes=['background','ball'])
    back = pre.inverse(pre(m), m.shape, m.affine)
    assert back.shape==m.shape and np.allclose(back.affine, aff)
    a,b = back.numpy()>0,m.numpy()>0
    assert 2*(a&b).sum()/(a.sum()+b.sum())>.7

@pytest.mark.parametrize('mm', [1.5,2,3])
@pytest.mark.parametrize('n', [38,39])
def test_a_resampled_mask_keeps_its_volume(mm, n):
    """Where new voxels lie halfway between old ones neither side may win them all: balls came back a fifth smaller. One
    part in ten is left to the roundness of small balls"""
    rng,there,back = np.random.default_rng(0),[],[]
    for _ in range(12):
        centre = rng.uniform(n/2-2, n/2+1, 3)[:,None,None,None]
        ball = np.linalg.norm(np.indices((n,n,n))-centre, axis=0)<=rng.uniform(3,4)*mm
        m = TensorVolumeMask(torch.from_numpy(ball.astype(np.int32)), affine=np.eye(4))
        pre = Preprocess(spacing=mm, codes=['background','ball'])
        there.append((pre(m).numpy()>0).sum()*mm**3/ball.sum())
        back.append((pre.inverse(pre(m), m.shape, m.affine).numpy()>0).sum()/ball.sum())
    assert .95<np.mean(there)<1.05 and .9<np.mean(back)<1.1, (np.mean(there), np.mean(back))

@swept(40, 150, grids, st.floats(.5, 4), st.sampled_from(['linear','cubic']))
def test_a_constant_stays_constant(g, mm, order):
    code,sp,ang,org,shape = g
    sp = np.clip(sp, .5, 4)
    shape = np.minimum(shape, 20)
    x = Preprocess(spacing=mm, normalize='none', order=order)(TensorVolume(torch.full((1,*shape), 7.25),
                   affine=affine(code, sp, ang, org)))
    assert np.allclose(x.numpy(), 7.25, atol=1e-3)

@pytest.mark.parametrize('dtype', [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64])
def test_every_nifti_type_gives_physical_values(dtype, tmp_path):
    a = np.arange(60).reshape(3,4,5).astype(dtype)
    nib.save(nib.Nifti1Image(a, np.eye(4)), tmp_path/'a.nii.gz')
    assert (load_volume(tmp_path/'a.nii.gz')[0].numpy()==a.astype(np.float32)).all()
    assert (load_mask(tmp_path/'a.nii.gz').numpy()==a.astype(np.int32)).all()

def test_a_mask_of_another_grid_is_resampled_only_when_asked(tmp_path):
    x = TensorVolume(torch.zeros(1,20,24,16), affine=np.diag([1,1,2,1.]))
    m = TensorVolumeMask(torch.zeros(40,24,16, dtype=torch.int32), affine=np.diag([.5,1,2,1.]))
    m[10:30,6:18,4:12] = 1
    r = resample_to(m, x.shape[1:], x.affine)
    assert same_grid(r.shape, r.affine, x.shape[1:], x.affine) and int(r.sum())>0

def test_png_images_with_masks_train_and_predict(tmp_path):
    rng,rows = np.random.default_rng(0),[]
    for i in range(6):
        m = np.zeros((48,40,1), np.int32)
        m[10+i:30,8:20+i] = 1
        for f,a in (('im',m*200+rng.integers(0,40,m.shape)), ('m',m)):
            t = TensorVolumeMask(torch.from_numpy(a), affine=np.diag([-1,-1,1,1.]))
            save_volume(t, tmp_path/f'{f} {i} ü.png')
        rows.append(dict(case=i, image=tmp_path/f'im {i} ü.png', mask=tmp_path/f'm {i} ü.png'))
    dls = SliceDataLoaders.from_df(pd.DataFrame(rows), cache=tmp_path/'c', device='cpu', path=tmp_path,
                                   samples_per_case=2)
    assert dls.plan.axis==2 and dls.plan.patch[2]==1
    learn = unet2d_learner(dls, nf=4, depth=2)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    p = learn.predict_volume(rows[0]['image'])
    assert p.shape==(48,40,1)
    p.save(tmp_path/'out.png')
    assert (load_mask(tmp_path/'out.png').numpy()==p.numpy()).all()

def test_a_single_dicom_slice_is_an_image(data):
    f = sorted((data/'ct_dicom'/'philips_phantom_no_tilt_5mm').iterdir())[0]
    t = load_volume(f)
    assert t.ndim==4 and t.shape[-1]==1 and -1100<float(t.min())<0

@pytest.mark.parametrize('what', ['channels','mask grid','no mask','empty masks','values','one subject','group',
                                  'codes'])
def test_from_df_names_what_is_wrong(what, tmp_path):
    rows = []
    for i in range(4):
        a = np.random.default_rng(i).random((12,14,10,2 if what=='channels' and i==2 else 1)).astype(np.float32)
        m = np.zeros((12,14,10), np.uint8)
        if what!='empty masks': m[4:8,4:8,4:8] = 255 if what=='values' else 1
        nib.save(nib.Nifti1Image(a, np.eye(4)), tmp_path/f'im{i}.nii.gz')
        nib.save(nib.Nifti1Image(m, np.diag([2,1,1,1.]) if what=='mask grid' and i==1 else np.eye(4)),
                 tmp_path/f'm{i}.nii.gz')
        rows.append(dict(case=f'case{i}', subject=0 if what=='one subject' else i, image=tmp_path/f'im{i}.nii.gz',
                         mask=None if what=='no mask' and i==3 else tmp_path/f'm{i}.nii.gz'))
    kw = {'group':dict(group_col='patient'), 'codes':dict(codes=['background'])}.get(what, {})
    want = {'channels':'case2','mask grid':'m1.nii.gz','no mask':'case3','empty masks':'background','values':'255',
            'one subject':'two groups','group':'patient','codes':'m0.nii.gz|m1.nii.gz|m2.nii.gz|m3.nii.gz'}[what]
    with pytest.raises((ValueError, KeyError), match=want):
        VolumeDataLoaders.from_df(pd.DataFrame(rows), cache=tmp_path/'c', device='cpu', **kw)

@pytest.mark.parametrize('copy',
                         [lambda t: type(t)(t, affine=t.affine),
                          lambda t: type(t)(t.as_subclass(torch.Tensor), affine=t.affine), lambda t: t.clone(),
                          lambda t: t*1, lambda t: t[...]])
@pytest.mark.parametrize('cls', [TensorVolume, TensorVolumeMask])
def test_a_copy_has_a_place_of_its_own(cls, copy):
    "fastai lets tensors share their metadata: a new affine of the second moved the first"
    t = cls(torch.zeros(1,3,4,5) if cls is TensorVolume else torch.zeros(3,4,5).byte(), affine=np.eye(4))
    c = copy(t)
    assert np.array_equal(c.affine, t.affine)
    c.affine[:3,3] = 7
    c.affine = np.diag([2,2,2,1])@c.affine
    assert np.array_equal(t.affine, np.eye(4)) and c.spacing==(2,2,2)

@pytest.mark.parametrize('draw', [lambda t,m: plot_volume(t, m), lambda t,m: plot_volume(t, pred=m),
                         lambda t,m: t.show(mask=m), lambda t,m: plot_volume(t, m, axis=1)])
def test_a_mask_that_lies_elsewhere_is_not_drawn(draw):
    "It was drawn over the image, where it does not lie"
    t,m = TensorVolume(torch.rand(1,6,7,8), affine=np.eye(4)),torch.ones(6,7,8).byte()
    draw(t, TensorVolumeMask(m, affine=np.eye(4)+1e-6))
    for other,match in ((TensorVolumeMask(m, affine=np.diag([1,1,-1,1])), 'lies elsewhere'),
            (TensorVolumeMask(m[1:], affine=np.eye(4)), 'expected a mask of')):
        with pytest.raises(InputError, match=match): draw(t, other)

def turned_by(axis, degrees):
    from scipy.spatial.transform import Rotation
    a = np.eye(4)
    a[:3,:3] = Rotation.from_rotvec(np.array(axis)/np.linalg.norm(axis)*np.radians(degrees)).as_matrix()
    return a

between_names = [turned_by((0,0,1), 45)@turned_by((1,0,0), 45), turned_by((1,1,0), 90), turned_by((1,1,1), 60),
                 turned_by((0,0,1), 45), turned_by((1,0,0), 135)]

@pytest.mark.parametrize('k', range(len(between_names)))
@pytest.mark.parametrize('size', [(1,1,1), (-1,1,1), (2,1.5,1), (-1,1,3)])
@pytest.mark.parametrize('spacing', [None, .5])
def test_a_grid_between_two_names_of_axes_finds_back(k, size, spacing):
    "At 45° the letters of the axes hang on the last digit of the header: masks came back with their axes exchanged"
    for shape in ((12,12,12), (11,9,7)):
        aff = between_names[k]@np.diag([*size,1.])
        aff = aff.astype(np.float32).astype(float)
        m = np.zeros(shape, np.int32)
        m[2:9,1:4,1:3] = 1
        m[2:4,1:8,1:3] = 1
        pre = Preprocess(codes=['background','a'], spacing=spacing)
        there = pre(TensorVolumeMask(torch.from_numpy(m), affine=aff))
        back = pre.inverse(there, shape, aff)
        assert (back.numpy()!=m).sum()<=(0 if spacing is None else 6)
        x = pre(TensorVolume(torch.from_numpy(m[None].astype(np.float32)), affine=aff))
        assert x.shape[1:]==there.shape and np.allclose(x.affine, there.affine)

def test_a_part_of_a_volume_knows_its_place(tmp_path):
    "A box cut out kept the affine of the whole, and was saved voxels away; so was what is flipped or of another size"
    aff = affine('LAS', (1,2,3), .3, (5,6,7))
    v = TensorVolume(torch.rand(2,9,8,7), affine=aff)
    part = v[:1, 4:, ::2, -3:]
    assert np.allclose(part.affine@[0,0,0,1], aff@[4,0,4,1]) and np.allclose(part.spacing, (1,4,3))
    assert np.allclose(load_volume(part.save(tmp_path/'part.nii.gz')).affine, part.affine, atol=1e-4)
    m = TensorVolumeMask(torch.ones(9,8,7).int(), affine=aff)
    assert np.allclose(m[2:].affine@[0,0,0,1], aff@[2,0,0,1])
    for same in (v[0], v[[1]], v[None], v*2, v.mean(0), v[...], torch.cat([v,v]), v.clone()):
        assert np.array_equal(same.affine, aff)
    lost = [v.flip(1), v.permute(0,2,1,3), v.transpose(1,2), torch.rot90(v, 1, (1,2)), v.roll(2, 1), v[...,3],
            torch.cat([v,v], 1), v[:, [3,4,5]], torch.nn.functional.interpolate(v[None], scale_factor=2)]
    for t in lost:
        assert t.affine is None
        with pytest.raises(InputError, match='affine'): save_volume(t, tmp_path/'lost.nii.gz')
    with pytest.raises(InputError, match='affine'): resample_to(v.flip(1), v.shape[1:], aff)
    assert np.array_equal(v.affine, aff)

def test_a_type_that_cannot_hold_the_values_is_refused(tmp_path):
    "300 became 44 and -3 became 253 in 8 bits; 1.9 became 1"
    m = TensorVolumeMask(torch.tensor([[[-3,300]]]), affine=np.eye(4))
    for dtype in (np.uint8, np.int8, np.uint16):
        with pytest.raises(InputError, match='holds'): save_volume(m, tmp_path/'m.nii.gz', dtype=dtype)
        assert not (tmp_path/'m.nii.gz').exists()
    assert load_mask(save_volume(m, tmp_path/'m.nii.gz', dtype=np.int16)).flatten().tolist()==[-3,300]
    v = TensorVolume(torch.tensor([[[[1.9,-2.6]]]]), affine=np.eye(4))
    assert load_volume(save_volume(v, tmp_path/'v.nii.gz', dtype=np.int16)).flatten().tolist()==[2,-3]
    with pytest.raises(InputError, match='holds'): save_volume(v*np.nan, tmp_path/'v.nii.gz', dtype=np.int16)

def test_a_sheared_grid_is_told(tmp_path):
    "Of a gantry tilted by 18.5° volumes came out 5 % too large without a word"
    from fastmed.learn.callbacks import case_truth
    aff = np.eye(4)
    aff[1,2] = np.tan(np.radians(18.5))
    m = TensorVolumeMask(torch.ones(4,5,6).int(), affine=aff)
    m.save(tmp_path/'m.nii.gz')
    with pytest.warns(UserWarning, match='right angles.*5.2%'):
        case_truth(Preprocess(codes=['b','a']), tmp_path/'m.nii.gz', m)
