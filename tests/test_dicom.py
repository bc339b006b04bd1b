"DICOM: what lies in a tree, how slices stack, what is refused and why, segmentations, and nobody's name."
import shutil
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

pydicom = pytest.importorskip('pydicom')
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    HTJ2K,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

import fastmed.io.series
from fastmed.all import (
    FastmedError,
    InputError,
    TensorVolumeMask,
    check_dataset,
    load_dicom_seg,
    load_mask,
    load_volume,
    read_header,
    save_dicom_seg,
    save_volume,
    scan_dicom,
    to_orientation,
)
from fastmed.cli import main
from fastmed.core import ArgumentError, FileError
from fastmed.io.dicom import dicom_series

NAME,ID,BIRTH = 'Plantedname^Gertrud','PID-4711-PLANTED','19430217'
PLANES = dict(axial=(1,0,0,0,1,0), coronal=(1,0,0,0,0,-1), sagittal=(0,1,0,0,0,-1), flipped=(-1,0,0,0,1,0))
c,s = np.cos(.35),np.sin(.35)
PLANES['oblique'] = (c,s*c,s*s,-s,c*c,s*c)      # two turns; made orthonormal below
def axes_of(plane):
    r,q = np.array(PLANES[plane], dtype=float).reshape(2,3)
    r /= np.linalg.norm(r)
    q -= r*(q@r)
    q /= np.linalg.norm(q)
    return r,q,np.cross(r,q)

def header(uid=None, series=None, study=None, frame=None, cls=CTImageStorage, modality='CT', **kw):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = cls
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid or generate_uid()
    ds.SeriesInstanceUID,ds.StudyInstanceUID,ds.FrameOfReferenceUID = (series or generate_uid(),study or generate_uid(),
            frame or generate_uid())
    ds.Modality,ds.PatientName,ds.PatientID,ds.PatientBirthDate,ds.PatientSex = modality,NAME,ID,BIRTH,'F'
    ds.ReferringPhysicianName,ds.AccessionNumber,ds.StudyID = 'Plantedname^Doctor','PID-4711-ACC','1'
    ds.InstitutionName = 'Plantedname Clinic'
    ds.StudyDate,ds.StudyTime,ds.SeriesDescription,ds.SeriesNumber,ds.ImageType,ds.PositionReferenceIndicator = (
            '20200101','120000','head thin',3,['ORIGINAL','PRIMARY','AXIAL'],'')
    ds.Manufacturer = 'Maker'
    ds.SamplesPerPixel,ds.PhotometricInterpretation = 1,'MONOCHROME2'
    for k,v in kw.items(): setattr(ds, k, v)
    return ds

def pixels(ds, a, stored=16, signed=False, high=0):
    "`a` (columns, rows) into the dataset; `high`: what stands in the bits that are not stored"
    ds.Columns,ds.Rows = a.shape
    ds.BitsAllocated,ds.BitsStored,ds.HighBit,ds.PixelRepresentation = 16,stored,stored-1,int(signed)
    b = np.ascontiguousarray(a.T).astype(np.int16 if signed else np.uint16).view(np.uint16)
    if stored<16: b = (b & (2**stored-1)) | np.uint16(high<<stored)
    ds.PixelData = b.tobytes()
    return ds

def write(path, vol=None, plane='axial', px=(.7,.9), gap=2.5, origin=(-30.,20.,100.), seed=0, at=None, shear=0.,
          slope=lambda k: 1., inter=lambda k: -1024., names=None, each=lambda ds, k: None, drop=(), bits=None,
          uids=None, **kw):
    "A series on disk in shuffled order of names; gives (volume of physical values (X,Y,Z), affine)"
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    if vol is None: vol = rng.integers(0, 2000, (14,11,7))
    r,q,n = axes_of(plane)
    t = gap*np.arange(vol.shape[2]) if at is None else np.asarray(at, dtype=float)
    ids = uids or dict(series=generate_uid(), study=generate_uid(), frame=generate_uid())
    order = rng.permutation(vol.shape[2])
    for k in range(vol.shape[2]):
        if k in drop: continue
        ds = header(**ids, **kw)
        pixels(ds, vol[:,:,k], **(bits or {}))
        ds.ImagePositionPatient = [f'{o:.8g}'[:16] for o in np.array(origin)+n*t[k]+q*shear*t[k]]
        ds.ImageOrientationPatient = [f'{o:.9f}'[:16] for o in (*r,*q)]
        ds.PixelSpacing = [px[1],px[0]]
        ds.SliceThickness = gap
        ds.InstanceNumber = k+1
        ds.RescaleSlope,ds.RescaleIntercept = slope(k),inter(k)
        each(ds, k)
        ds.save_as(path/(names(k) if names else f'{order[k]:03d}.dcm'), enforce_file_format=True)
    aff = np.eye(4)
    aff[:3,:3] = np.stack([r*px[0],q*px[1],n*(t[-1]-t[0])/max(1,len(t)-1)],1)
    aff[:3,3] = np.array(origin)+n*t[0]
    return np.stack([vol[:,:,k]*slope(k)+inter(k) for k in range(vol.shape[2])],
                    -1).astype(np.float32),np.diag([-1,-1,1,1.])@aff

def sitk_read(path):
    import SimpleITK as sitk
    r = sitk.ImageSeriesReader()
    r.SetFileNames(r.GetGDCMSeriesFileNames(str(path)))
    r.SetOutputPixelType(sitk.sitkFloat32)
    im = r.Execute()
    aff = np.eye(4)
    aff[:3,:3] = np.array(im.GetDirection()).reshape(3,3)*im.GetSpacing()
    aff[:3,3] = im.GetOrigin()
    return sitk.GetArrayFromImage(im).transpose(2,1,0),np.diag([-1,-1,1,1.])@aff

# ---- volumes

@pytest.mark.parametrize('plane', PLANES)
def test_as_simpleitk_reads_it(plane, tmp_path):
    vol,aff = write(tmp_path/'s', plane=plane)
    t = load_volume(tmp_path/'s')
    a,b = sitk_read(tmp_path/'s')
    assert np.array_equal(t[0].numpy(), vol) and np.allclose(t.affine, aff, atol=1e-4)
    assert np.array_equal(t[0].numpy(), a) and np.allclose(t.affine, b, atol=1e-4)
    h = read_header(tmp_path/'s')
    assert h['shape']==vol.shape and np.array_equal(h['affine'], t.affine) and h['channels']==1
    s = scan_dicom(tmp_path).series[0]
    u = load_volume(s)
    assert torch.equal(t, u) and np.array_equal(t.affine, u.affine) and len(s)==7 and [o.number
            for o in s.frames]==list(range(1,8))
    fn = save_volume(t, tmp_path/'t.nii.gz')
    im = nib.load(fn)
    assert np.allclose(im.affine, aff, atol=1e-4) and np.array_equal(im.get_fdata(dtype=np.float32), vol)

def test_order_of_positions_not_of_numbers(tmp_path):
    vol,aff = write(tmp_path/'a', each=lambda ds,k: setattr(ds, 'InstanceNumber', 100-k))
    t = load_volume(tmp_path/'a')
    assert np.array_equal(t[0].numpy(), vol) and np.allclose(t.affine, aff, atol=1e-4)
    # numbered from the top down
    vol,aff = write(tmp_path/'b', gap=-2.5)
    t = load_volume(tmp_path/'b')
    assert np.array_equal(t[0].numpy(), vol[:,:,::-1]) and t.spacing[2]==pytest.approx(2.5) and np.allclose(t.affine,
            sitk_read(tmp_path/'b')[1], atol=1e-4)

def test_slope_and_intercept_of_each_slice(tmp_path):
    vol,_ = write(tmp_path/'s', slope=lambda k: .25*(k+1), inter=lambda k: -100.*k)
    t = load_volume(tmp_path/'s')
    assert np.allclose(t[0].numpy(), vol) and np.allclose(vol, sitk_read(tmp_path/'s')[0], atol=1e-3)

@pytest.mark.parametrize('signed,stored,high', [(False,12,0),(False,12,11),(True,12,0),(True,12,5),(True,16,0),
                         (False,16,0),(False,10,63)])
def test_bits_that_are_stored(signed, stored, high, tmp_path):
    lo,hi = (-2**(stored-1),2**(stored-1)) if signed else (0,2**stored)
    v = np.random.default_rng(1).integers(lo, hi, (9,8,4))
    v[0,0,0],v[1,0,0] = lo,hi-1
    vol,_ = write(tmp_path/'s', v, bits=dict(stored=stored, signed=signed, high=high))
    t = load_volume(tmp_path/'s')
    assert np.array_equal(t[0].numpy(), vol)
    assert np.array_equal(t[0].numpy(), sitk_read(tmp_path/'s')[0])

def test_padding_stays_and_is_told(tmp_path):
    v = np.full((8,8,4), 1000)
    v[:2] = -2000
    vol,_ = write(tmp_path/'s', v, bits=dict(signed=True), each=lambda ds,k: setattr(ds, 'PixelPaddingValue', -2000))
    t = load_volume(tmp_path/'s')
    assert np.array_equal(t[0].numpy(), vol) and t.meta['padding']==-3024
    write(tmp_path/'m', each=lambda ds,k: setattr(ds, 'PhotometricInterpretation', 'MONOCHROME1'))
    assert load_volume(tmp_path/'m').meta['photometric']=='MONOCHROME1'

@pytest.mark.parametrize('syntax', [RLELossless, JPEGLSLossless])
def test_compressed(syntax, tmp_path):
    vol,_ = write(tmp_path/'s')
    want = load_volume(tmp_path/'s')
    for f in (tmp_path/'s').iterdir():
        ds = pydicom.dcmread(f)
        try: ds.compress(syntax)
        except Exception: pytest.skip('no encoder')
        ds.save_as(f)
    assert torch.equal(load_volume(tmp_path/'s'), want)

def enhanced(fn, cls=EnhancedCTImageStorage, modality='CT', order=None, extra=lambda d, k: None, plane='oblique', n=6,
             times=1):
    "An enhanced multi-frame file with slope and intercept of each frame; (volume, affine)"
    rng = np.random.default_rng(3)
    v = rng.integers(0, 4000, (10,8,n*times))
    r,q,nn = axes_of(plane)
    px,gap = (.8,.6),3.
    ds = header(cls=cls, modality=modality)
    order = list(range(n*times)) if order is None else order
    pixels(ds, v[:,:,0])
    ds.PixelData = np.stack([v[:,:,k].T for k in order]).astype(np.uint16).tobytes()
    ds.NumberOfFrames = len(order)
    ds.InstanceNumber = 1
    sh = Dataset()
    m = Dataset()
    m.PixelSpacing,m.SliceThickness = [px[1],px[0]],gap
    sh.PixelMeasuresSequence = Sequence([m])
    o = Dataset()
    o.ImageOrientationPatient = [f'{x:.9f}'[:16] for x in (*r,*q)]
    sh.PlaneOrientationSequence = Sequence([o])
    ds.SharedFunctionalGroupsSequence = Sequence([sh])
    per = []
    for k in order:
        d,p,l = Dataset(),Dataset(),Dataset()
        p.ImagePositionPatient = [f'{x:.8g}'[:16] for x in np.array((5.,6,7))+nn*gap*(k%n)]
        l.RescaleSlope,l.RescaleIntercept,l.RescaleType = 1+.5*k,-10.*k,'US'
        d.PlanePositionSequence,d.PixelValueTransformationSequence = Sequence([p]),Sequence([l])
        extra(d, k)
        per.append(d)
    ds.PerFrameFunctionalGroupsSequence = Sequence(per)
    ds.save_as(fn, enforce_file_format=True)
    aff = np.eye(4)
    aff[:3,:3] = np.stack([r*px[0],q*px[1],nn*gap],1)
    aff[:3,3] = (5,6,7)
    return np.stack([v[:,:,k]*(1+.5*k)-10.*k for k in range(n*times)],-1).astype(np.float32),np.diag([-1,-1,1,1.])@aff

def test_enhanced_multi_frame(tmp_path):
    vol,aff = enhanced(tmp_path/'a.dcm', order=[3,0,5,1,4,2])
    t = load_volume(tmp_path/'a.dcm')
    assert np.allclose(t[0].numpy(), vol) and np.allclose(t.affine, aff, atol=1e-4)
    r = scan_dicom(tmp_path/'a.dcm').iloc[0]
    assert r.slices==6 and r.plane=='oblique axial' and torch.equal(load_volume(r.series),
            t) and read_header(tmp_path/'a.dcm')['shape']==(10,8,6)
    def echo(d, k):
        e = Dataset()
        e.EffectiveEchoTime = 10. if k<6 else 30.
        d.MREchoSequence = Sequence([e])
    vol,aff = enhanced(tmp_path/'b.dcm', pydicom.uid.EnhancedMRImageStorage, 'MR', extra=echo, times=2)
    with pytest.raises(InputError, match=r'EchoTime \(10.0, 30.0\).*split'): load_volume(tmp_path/'b.dcm')
    a,b = dicom_series(tmp_path/'b.dcm').split()
    assert np.allclose(load_volume(a)[0].numpy(), vol[...,:6]) and np.allclose(load_volume(b)[0].numpy(),
            vol[...,6:]) and 'EchoTime 10.0' in str(a)

def test_multi_frame_without_positions_is_no_volume(tmp_path):
    ds = header(cls='1.2.840.10008.5.1.4.1.1.3.1', modality='US')
    pixels(ds, np.zeros((6,5), int))
    ds.NumberOfFrames = 4
    ds.PixelData = bytes(6*5*2*4)
    ds.save_as(tmp_path/'cine.dcm', enforce_file_format=True)
    with pytest.raises(InputError, match='no position'): load_volume(tmp_path/'cine.dcm')
    assert [len(o) for o in dicom_series(tmp_path/'cine.dcm').split()]==[1]*4

def test_one_image(tmp_path):
    ds = header(modality='DX', cls='1.2.840.10008.5.1.4.1.1.1.1', PhotometricInterpretation='MONOCHROME1',
                ImagerPixelSpacing=[.2,.1])
    a = np.arange(63).reshape(9,7)
    pixels(ds, a).save_as(tmp_path/'x', enforce_file_format=True)
    t = load_volume(tmp_path/'x')
    assert np.array_equal(t[0,...,0].numpy(), a) and np.allclose(t.spacing,
            (.1,.2,1)) and t.meta['photometric']=='MONOCHROME1'
    r = scan_dicom(tmp_path).iloc[0]
    assert (r.slices,r.problem,r.plane,r['shape'])==(1,'','unknown',(9,7,1)) and torch.equal(load_volume(r.series), t)

# ---- refused

def refused(what, *match):
    with pytest.raises(InputError) as e: load_volume(what)
    for m in match: assert m in str(e.value), (m, str(e.value))
    return str(e.value)

def test_missing_slices_are_named(tmp_path):
    write(tmp_path/'s', np.zeros((6,5,12), int), drop=(3,7,8), gap=2.)
    refused(tmp_path/'s', 'every 2.00 mm', '3 are missing', '106.0 mm, between image 3',
            '114.0, 116.0 mm, between image 7')
    assert 'missing' in scan_dicom(tmp_path).problem[0] and load_volume(tmp_path/'s', regrid=True).shape==(1,6,5,12)

def test_irregular_and_tilted(tmp_path):
    write(tmp_path/'g', at=(0,2,4,6.7,8.7,10.7,12.7))
    refused(tmp_path/'g', 'gaps from 2.00 to 2.70 mm', 'regrid=True')
    write(tmp_path/'t', shear=np.tan(np.radians(20)))
    refused(tmp_path/'t', 'tilted by 20.0°')
    # rounding
    write(tmp_path/'r', at=(0,2.502,4.998,7.5,10,12.5,15))
    assert load_volume(tmp_path/'r').spacing[2]==pytest.approx(2.5)
    m = tmp_path/'m'
    write(m, each=lambda ds,k: setattr(ds, 'ImagePositionPatient', [-30+3*(k%2),20,100+2.5*k]))
    refused(m, 'shifted sideways')
    for o in (0, -1, 'yes', float('nan'), None):
        with pytest.raises(ArgumentError, match='regrid'): load_volume(tmp_path/'g', regrid=o)
    with pytest.raises(ArgumentError, match='regrid'):
        load_volume(save_volume(load_volume(tmp_path/'r'), tmp_path/'x.nii'), regrid=True)

def ball(aff, shape, center, radius):
    ijk = np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), -1)
    return np.linalg.norm(ijk@aff[:3,:3].T+aff[:3,3]-center, axis=-1)-radius

@pytest.mark.parametrize('plane', ['axial','oblique','sagittal'])
@pytest.mark.parametrize('tilt,at', [(18.5,None),(0,(0,1.1,3,5,7,9,10.3,12,14,17,18,20,22,25,27,28,30,32,34,36)),
                         (-25,(0,1.5,3,5,7,9,10.3,12,14,17,18,20,22,25,27,28,30,32,34,36))])
def test_regridded_anatomy_is_where_it_was(plane, tilt, at, tmp_path):
    "A ball, imaged by slices that are sheared and unevenly spaced, is a ball of the same size at the same place"
    r,q,n = axes_of(plane)
    origin,px = np.array((-30.,20,100)),(.9,1.1)
    t = 2.*np.arange(20) if at is None else np.array(at)
    sh = np.tan(np.radians(tilt))
    center = origin+r*27+q*(27+sh*18)+n*18
    ij = np.stack(np.meshgrid(np.arange(60), np.arange(50), indexing='ij'), -1)
    v = np.stack([np.linalg.norm(origin+n*o+q*sh*o+ij[...,:1]*px[0]*r+ij[...,1:]*px[1]*q-center, axis=-1) for o in t],
                 -1)
    write(tmp_path/'s', np.clip(1500-60*v, 0, None).astype(int), plane, px, origin=tuple(origin), at=t, shear=sh,
          inter=lambda k: 0.)
    x = load_volume(tmp_path/'s', regrid=True)
    want = np.clip(1500-60*(ball(x.affine, x.shape[1:], center*[-1,-1,1], 0)), 0, None)
    a = x[0].numpy()
    cos = x.affine[:3,:3]/x.spacing
    assert np.allclose(cos.T@cos, np.eye(3), atol=1e-6) and x.shape[1]==60 and np.allclose(x.spacing[:2], px)
    inner = np.ones_like(a, bool)
    inner[...,[0,-1]] = False
    # 60 per mm
    d = np.abs(a-want)[(want>100)&inner]
    assert d.mean()<8 and np.percentile(d, 99)<60, (d.mean(), np.percentile(d, 99))
    volume = (a>900).sum()*np.prod(x.spacing)
    assert volume==pytest.approx(4/3*np.pi*10**3, rel=.04)
    assert load_volume(tmp_path/'s', regrid=3.).spacing[2]==pytest.approx(3, rel=.08) and 'regrid' in x.meta
    # a mask drawn in the upright box goes back to the slices of the source
    m = TensorVolumeMask(torch.from_numpy((a>900).astype(np.uint8)), affine=x.affine)
    pytest.importorskip('highdicom')
    seg = pydicom.dcmread(save_dicom_seg(m, tmp_path/'s', tmp_path/'seg.dcm'))
    truth = v<10
    got = np.zeros_like(truth)
    for f,p in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence):
        k = int(np.argmin(np.abs((np.array(p.PlanePositionSequence[0].ImagePositionPatient, float)-origin)@n-t)))
        got[:,:,k] = f.T>0
    assert 2*(got&truth).sum()/(got.sum()+truth.sum())>.93

def test_several_series_sizes_and_localizers(tmp_path):
    a,b = tmp_path/'a',tmp_path/'b'
    write(a, names=lambda k: f'1{k}')
    write(a, seed=1, names=lambda k: f'2{k}', SeriesDescription='other')
    msg = refused(a, 'found 2', "'head thin'", "'other'", 'scan_dicom')
    df = scan_dicom(a)
    assert len(df)==2 and not any(o.alone for o in df.series) and df.key.nunique()==2 and df.subject.nunique()==1
    with pytest.raises(InputError, match='save'): Path(df.series[0])
    ids = dict(series=generate_uid(), study=generate_uid(), frame=generate_uid())
    vol,aff = write(b, uids=ids, names=lambda k: f's{k}')
    write(b, np.zeros((14,11,1), int), plane='coronal', uids=ids, names=lambda k: 'loc', seed=5)
    refused(b, 'not parallel', 'coronal: loc', 'axial', 'split')
    p = dicom_series(b).split()
    assert [len(o) for o in p]==[7,1] and np.array_equal(load_volume(p[0])[0].numpy(), vol)
    ids = dict(series=generate_uid(), study=generate_uid(), frame=generate_uid())
    write(tmp_path/'c', uids=ids)
    write(tmp_path/'c', np.zeros((6,5,2), int), uids=ids, names=lambda k: f'x{k}')
    refused(tmp_path/'c', 'no volume', '2 sizes', '6×5: x0, x1')
    with pytest.raises(FileError, match='scan_dicom'): load_volume(tmp_path)
    assert 'Plantedname' not in msg

@pytest.mark.parametrize('name,values', [('EchoTime',(4.6,9.2)), ('DiffusionBValue',(0.,1000.)),
        ('TemporalPositionIdentifier',(1,2)), ('AcquisitionNumber',(1,2)), (None,(0,1))])
def test_two_acquisitions(name, values, tmp_path):
    ids = dict(series=generate_uid(), study=generate_uid(), frame=generate_uid())
    def each(v):
        return lambda ds,k: (setattr(ds, name, v) if name else None,
                setattr(ds, 'InstanceNumber', k+1+7*values.index(v)))
    vols = [write(tmp_path/'s', seed=i, uids=ids, each=each(v), names=lambda k: f'{i}_{k}', cls=MRImageStorage,
                  modality='MR')[0] for i,v in enumerate(values)]
    refused(tmp_path/'s', 'one image a position', 'found 7 more', *(name,) if name else (), 'split')
    parts = scan_dicom(tmp_path).series[0].split()
    assert len(parts)==2
    for p,v in zip(parts, vols): assert np.array_equal(load_volume(p)[0].numpy(), v)

def test_one_image_under_two_names(tmp_path):
    write(tmp_path/'s')
    shutil.copy(tmp_path/'s/003.dcm', tmp_path/'s/copy.dcm')
    refused(tmp_path/'s', 'two names', 'copy.dcm')

# ---- files

def test_files_that_are_none(tmp_path):
    d = tmp_path/'Müller Übung'/'ein Ordner'
    vol,_ = write(d, names=lambda k: f'IM{k}')
    (d/'liesmich.txt').write_text('x'*500)
    (d/'.DS_Store').write_bytes(b'')
    (tmp_path/'photo.jpg').write_bytes(b'\xff\xd8'+bytes(300))
    sr = header(cls='1.2.840.10008.5.1.4.1.1.88.11', modality='SR')
    sr.save_as(d/'report', enforce_file_format=True)
    ddir = header(cls='1.2.840.10008.1.3.10')
    ddir.save_as(tmp_path/'DICOMDIR', enforce_file_format=True)
    for what in (tmp_path, tmp_path/'DICOMDIR'):
        df = scan_dicom(what)
        assert len(df)==1 and df.slices[0]==7 and (df.attrs['no_dicom'],df.attrs['no_image'],
                df.attrs['unreadable'])==(2,2,{}), df.attrs
    assert np.array_equal(load_volume(df.series[0])[0].numpy(),
                          vol) and Path(df.series[0])==d.resolve() and np.array_equal(load_volume(d)[0].numpy(), vol)
    (d/'IM9').write_bytes(b'')
    with pytest.warns(UserWarning, match='IM9.*0 bytes'): df = scan_dicom(tmp_path)
    assert list(df.attrs['unreadable'])==[str(d/'IM9')] and df.slices[0]==7
    with pytest.raises(FileError, match='IM9'): load_volume(d)
    (d/'IM9').unlink()
    b = (d/'IM3').read_bytes()
    (d/'IM3').write_bytes(b[:400])
    with pytest.raises(FileError, match='IM3'): load_volume(d)
    (d/'IM3').write_bytes(b[:-20])
    with pytest.raises(FileError, match='IM3.*truncated'): load_volume(d)
    assert scan_dicom(tmp_path).problem[0]==''               # headers alone are whole
    with pytest.raises(FileError, match='no DICOM image found in 1 files'): scan_dicom(tmp_path/'photo.jpg')
    with pytest.raises(FileNotFoundError, match='nowhere'): scan_dicom(tmp_path/'nowhere')

def test_undecodable_names_syntax_and_package(tmp_path):
    write(tmp_path/'s', np.zeros((6,5,1), int))
    f = tmp_path/'s/000.dcm'
    ds = pydicom.dcmread(f)
    for syntax,package in ((HTJ2K,'pylibjpeg-openjpeg'), (pydicom.uid.JPEGLosslessSV1,'pylibjpeg-libjpeg'),
            (pydicom.uid.MPEG4HP41,'export it uncompressed')):
        ds.PixelData = pydicom.encaps.encapsulate([bytes(range(64))])
        ds['PixelData'].VR = 'OB'
        ds['PixelData'].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = syntax
        ds.save_as(f, enforce_file_format=True)
        with pytest.raises(FileError) as e: load_volume(f)
        assert '000.dcm' in str(e.value) and syntax.name in str(e.value) and package in str(e.value)

def test_each_file_is_read_once(tmp_path, monkeypatch):
    vol,_ = write(tmp_path/'s', np.random.default_rng(0).integers(0, 99, (5,4,60)))
    seen = []
    old = fastmed.io.frames.read_elements
    def read(fn, tags, pixels=False):
        seen.append((Path(fn).name, pixels))
        return old(fn, tags, pixels)
    for module in (fastmed.io.frames, fastmed.io.formats): monkeypatch.setattr(module, 'read_elements', read)
    s = scan_dicom(tmp_path).series[0]
    assert len(seen)==60 and not any(p for _,p in seen)
    assert np.array_equal(load_volume(s)[0].numpy(), vol) and len(seen)==120 and len({n for n,p in seen if p})==60

def test_a_file_that_changed_since(tmp_path):
    write(tmp_path/'s')
    s = dicom_series(tmp_path/'s')
    pixels(pydicom.dcmread(s.files[2]), np.zeros((5,5), int)).save_as(s.files[2])
    with pytest.raises(FileError, match=s.files[2].name): load_volume(s)

# ---- segmentations

hd = pytest.importorskip('highdicom') if 'highdicom' in sys.modules or __import__('importlib.util').util.find_spec(
        'highdicom') else None
needs_hd = pytest.mark.skipif(hd is None, reason='needs highdicom')

def by_frames(fn, aff, shape):
    "What another reader sees: each frame put where its own position says, on the grid `aff`"
    ds = pydicom.dcmread(fn)
    sh = ds.SharedFunctionalGroupsSequence[0]
    a = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    out = np.zeros(shape, int)
    inv = np.linalg.inv(np.diag([-1,-1,1,1.])@aff)
    for f,p in zip(a, ds.PerFrameFunctionalGroupsSequence):
        get = lambda k: (p.get(k) or sh.get(k))[0]
        o = np.array(get('PlaneOrientationSequence').ImageOrientationPatient, float).reshape(2,3)
        sp = [float(x) for x in get('PixelMeasuresSequence').PixelSpacing]
        pos = np.array(get('PlanePositionSequence').ImagePositionPatient, float)
        y,x = np.nonzero(f)
        w = pos+x[:,None]*o[0]*sp[1]+y[:,None]*o[1]*sp[0]
        i = np.c_[w,np.ones(len(w))]@inv.T
        assert np.abs(i-i.round()).max(initial=0)<.02
        out[tuple(i[:,:3].round().astype(int).T)] = get('SegmentIdentificationSequence').ReferencedSegmentNumber
    return out

@needs_hd
@pytest.mark.parametrize('plane', [*PLANES, 'reversed', 'multi-frame'])
def test_segmentation_round_trip(plane, tmp_path):
    if plane=='multi-frame':
        src = tmp_path/'e.dcm'
        enhanced(src, order=[3,0,5,1,4,2])
    else:
        src = tmp_path/'s'
        write(src, plane='oblique' if plane=='reversed' else plane, gap=-2.5 if plane=='reversed' else 2.5)
    t = load_volume(src)
    m = TensorVolumeMask(torch.from_numpy(np.random.default_rng(2).integers(0, 4,
            t.shape[1:])*(np.arange(t.shape[3])!=2)), affine=t.affine, codes=['background','Leber','Größe','空'])
    fn = save_dicom_seg(m, src, tmp_path/'out'/'seg ü.dcm')
    assert np.array_equal(by_frames(fn, t.affine, t.shape[1:]), m.numpy())
    b = load_dicom_seg(fn, src)
    assert np.array_equal(b.numpy(), m.numpy()) and np.array_equal(b.affine, t.affine) and b.codes==m.codes
    seg = hd.seg.segread(fn)
    assert seg.number_of_segments==3 and [o.segment_label for o in seg.segment_descriptions] if hasattr(seg,
            'segment_descriptions') else True
    assert [seg.get_segment_description(i).segment_label for i in (1,2,3)]==['Leber','Größe','空']
    if plane!='multi-frame':
        uids = seg.get_source_image_uids()
        a = seg.get_pixels_by_source_instance([u[2] for u in uids], combine_segments=True)
        files = {str(pydicom.dcmread(f).SOPInstanceUID):i for i,f in enumerate(dicom_series(src).files)}
        for u,plane_ in zip(uids, a): assert np.array_equal(plane_.T, m.numpy()[...,files[str(u[2])]])
    ras = save_dicom_seg(to_orientation(m), src, tmp_path/'ras.dcm')
    assert np.array_equal(load_dicom_seg(ras, src).numpy(), m.numpy())
    empty = TensorVolumeMask(torch.zeros(t.shape[1:], dtype=torch.uint8), affine=t.affine, codes=['b','x'])
    assert load_dicom_seg(save_dicom_seg(empty, src, tmp_path/'empty.dcm'), src).sum()==0
    with pytest.raises(InputError, match='segmentation'): load_mask(fn)

@needs_hd
def test_segmentation_refused(tmp_path):
    write(tmp_path/'s')
    t = load_volume(tmp_path/'s')
    m = TensorVolumeMask(torch.ones(t.shape[1:], dtype=torch.uint8), affine=t.affine, codes=['b','x'])
    out = tmp_path/'o.dcm'
    aff = t.affine.copy()
    aff[0,3] += .5
    shifted = TensorVolumeMask(torch.ones(t.shape[1:], dtype=torch.uint8), affine=aff)
    for bad,kw,match in ((shifted, {}, 'does not lie on the grid'),
            (TensorVolumeMask(m[:5], affine=t.affine), {}, 'does not lie'), (m, dict(codes=['background']), 'names 1'),
            (TensorVolumeMask(m*5, affine=t.affine), dict(codes=['b','x']), 'class 5'),
            (torch.ones(3,3,3), {}, 'affine'), (m, dict(codes=['b',' ']), 'a name for each structure')):
        with pytest.raises(InputError, match=match): save_dicom_seg(bad, tmp_path/'s', out, **kw)
    with pytest.raises(InputError, match=str(tmp_path/'s')): save_dicom_seg(shifted, tmp_path/'s', out)
    out.write_text('old')
    with pytest.raises(InputError): save_dicom_seg(shifted, tmp_path/'s', out)
    assert out.read_text()=='old' and not list(tmp_path.glob('.part*'))
    write(tmp_path/'n', each=lambda ds,k: delattr(ds, 'FrameOfReferenceUID'))
    with pytest.raises(InputError, match='frame of reference'): save_dicom_seg(m, tmp_path/'n', tmp_path/'x.dcm')
    save_dicom_seg(m, tmp_path/'s', out)
    write(tmp_path/'other', origin=(0,0,0))
    with pytest.raises(InputError, match='another frame of reference'): load_dicom_seg(out, tmp_path/'other')
    place = pydicom.dcmread(tmp_path/'s/000.dcm').FrameOfReferenceUID
    write(tmp_path/'other', origin=(0,0,0), each=lambda ds,k: setattr(ds, 'FrameOfReferenceUID', place))
    with pytest.raises(InputError, match='does not lie on a slice'): load_dicom_seg(out, tmp_path/'other')
    with pytest.raises(InputError, match='no DICOM segmentation'): load_dicom_seg(tmp_path/'s/000.dcm', tmp_path/'s')

def test_highdicom_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'highdicom', None)
    with pytest.raises(ImportError, match=r'fastmed\[dicom\]'): save_dicom_seg(None, tmp_path, tmp_path/'x.dcm')

# ---- identity

def planted(b):
    return [o for o in (NAME, 'Plantedname', 'Gertrud', ID, BIRTH, 'PID-4711', '1943-02-17') if o.encode() in b
            or o.lower().encode() in b or o.encode('utf-16-le') in b]

@needs_hd
def test_identity_in_a_segmentation(tmp_path):
    write(tmp_path/'s')
    t = load_volume(tmp_path/'s')
    m = TensorVolumeMask(torch.ones(t.shape[1:], dtype=torch.uint8), affine=t.affine, codes=['b','x'])
    b = save_dicom_seg(m, tmp_path/'s', tmp_path/'a.dcm').read_bytes()
    assert not planted(b)
    a,k = pydicom.dcmread(tmp_path/'a.dcm'),pydicom.dcmread(save_dicom_seg(m, tmp_path/'s', tmp_path/'b.dcm',
            strip_identity=False))
    src = pydicom.dcmread(next((tmp_path/'s').iterdir()))
    assert (a.PatientName,a.PatientID,a.PatientBirthDate)==('','','') and a.PatientIdentityRemoved=='YES'
    assert a.StudyInstanceUID==src.StudyInstanceUID==k.StudyInstanceUID
    assert len(a.ReferencedSeriesSequence[0].ReferencedInstanceSequence)==7
    assert (k.PatientName,k.PatientID,k.PatientBirthDate)==(NAME,ID,BIRTH)
    write(tmp_path/'u', PatientName='Müller^Jörg', SpecificCharacterSet='ISO_IR 100')
    assert str(pydicom.dcmread(save_dicom_seg(m, tmp_path/'u', tmp_path/'u.dcm',
                                              strip_identity=False)).PatientName)=='Müller^Jörg'

def test_identity_stays_in_the_files(tmp_path, capfd, cache):    # a table  # noqa: PLR0915
    """Nothing of the patient in tables, NIfTI, reports, logs, exported models; the words are planted in every header,
    and an invalid birth date makes others warn"""
    from fastmed.all import VolumeDataLoaders, save_model, unet3d_learner
    for i in range(4):
        v = np.random.default_rng(i).integers(0, 500, (16,16,16))
        v[4:12,4:12,4:12] += 800
        write(tmp_path/f'c{i}'/'ct', v, px=(1.,1.), gap=1., PatientID=f'{ID}-{i}',
                SeriesDescription=f'{NAME.split("^")[0].upper()} head {ID}-{i}', seed=i,
                each=lambda ds,k: ds.__setattr__('PatientComments', NAME))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        df = scan_dicom(tmp_path)
        assert df.subject.nunique()==4 and df.description.str.contains('head').all() and 'patient_name' not in df
        text = df.to_csv()+repr(df.series[0])+repr(df.attrs)
        for s,k in zip(df.series, df.key):
            import pickle
            assert not planted(pickle.dumps(s)) and k==scan_dicom(s).key[0]
            t = load_volume(s)
            text += repr(t.meta)
            m = TensorVolumeMask((t[0]>0).to(torch.uint8), affine=t.affine)
            save_volume(t, tmp_path/f'{k}.nii')
            save_volume(m, tmp_path/'m'/f'{k}.nii')
        d = df.assign(case=df.key, image=df.series, mask=[tmp_path/'m'/f'{k}.nii' for k in df.key])
        r = check_dataset(d)
        text += r.to_csv()
        r.html(tmp_path/'r.html')
        for o in ('truncated','tilt'):
            bad = tmp_path/o
            write(bad, shear=.5 if o=='tilt' else 0)
            if o=='truncated':
                f = bad/'003.dcm'
                f.write_bytes(f.read_bytes()[:-50])
            try: load_volume(bad)
            except FastmedError as e: text += repr(e)+str(e.__context__ or '')
        dls = VolumeDataLoaders.from_df(d, path=tmp_path, codes=['b','x'], patch=16, bs=2, samples_per_case=1,
                                        num_workers=0, device='cpu', cache=cache, spacing=None)
        learn = unet3d_learner(dls, nf=2, depth=2)
        learn.fit(1)
        learn.export('e.pkl')
        save_model(learn, tmp_path/'m.safetensors')
        learn.predict_volume(df.series[0]).save(tmp_path/'p.nii')
        text += learn.evaluate().to_csv()
        code = main(['scan', str(tmp_path/'c0')])
        assert code==0
    out = capfd.readouterr()
    text += out.out+out.err+''.join(str(o.message) for o in w)
    assert not planted(text.encode()), planted(text.encode())
    made = [o for o in [*tmp_path.glob('*.*'), *(tmp_path/'m').iterdir(), *cache.rglob('*')] if o.is_file()]
    assert len(made)>12 and {'.html','.pkl','.safetensors','.nii','.npy'}<={o.suffix for o in made}
    for o in made: assert not planted(o.read_bytes()), o
    full = scan_dicom(tmp_path/'c0', strip_identity=False).iloc[0]
    assert (full.patient_name,full.patient_id,full.birth_date)==(NAME,f'{ID}-0',BIRTH)

# ---- around

def test_scan_from_the_command_line(tmp_path, capsys):
    write(tmp_path/'a')
    write(tmp_path/'b', drop=(2,))
    (tmp_path/'x.txt').write_text('no')
    assert main(['scan', str(tmp_path)])==0
    out = capsys.readouterr().out
    assert 'head thin' in out and 'missing' in out and '1 file is no DICOM' in out
    assert main(['scan', str(tmp_path/'x.txt')])==2 and capsys.readouterr().err.count('\n')==1
    assert main(['scan', str(tmp_path), '--csv', str(tmp_path/'t.csv')])==0 and len(pd.read_csv(tmp_path/'t.csv'))==2

def test_doctor_names_tilt_and_gaps(tmp_path):
    write(tmp_path/'ok')
    write(tmp_path/'gap', drop=(3,))
    write(tmp_path/'tilt', shear=.4)
    r = check_dataset(pd.DataFrame([dict(case=o, image=tmp_path/o) for o in ('ok','gap','tilt')])).errors.set_index(
            'case')
    assert set(r.index)=={'gap',
            'tilt'} and 'missing, at 107.5 mm' in r.found['gap'] and 'tilted by 21.8°' in r.found['tilt']

def test_key_is_stable(tmp_path):
    write(tmp_path/'a')
    k = scan_dicom(tmp_path).key[0]
    shutil.move(tmp_path/'a', tmp_path/'b')
    assert scan_dicom(tmp_path).key[0]==k and k not in str(
            pydicom.dcmread(next((tmp_path/'b').iterdir())).SeriesInstanceUID)

@needs_hd
def test_real_series(data, tmp_path):
    d = data/'ct_dicom'
    df = scan_dicom(d).set_index('folder')
    assert df.slices.to_dict()=={'ge_tilt18.5_variable_gap':28,'philips_exam_summary_mixed_size':6,
                                 'philips_phantom_no_tilt_5mm':28}
    t = load_volume(df.series['philips_phantom_no_tilt_5mm'])
    a,b = sitk_read(d/'philips_phantom_no_tilt_5mm')
    assert np.array_equal(t[0].numpy(), a) and np.allclose(t.affine, b, atol=1e-4)
    m = TensorVolumeMask((t[0]>100).to(torch.uint8)+(t[0]>600).to(torch.uint8), affine=t.affine,
            codes=['background','acrylic','bone'])
    fn = save_dicom_seg(m, d/'philips_phantom_no_tilt_5mm', tmp_path/'seg.dcm')
    assert np.array_equal(by_frames(fn, t.affine, t.shape[1:]), m.numpy()) and np.array_equal(load_dicom_seg(fn,
            df.series['philips_phantom_no_tilt_5mm']).numpy(), m.numpy())
    refused(df.series['ge_tilt18.5_variable_gap'], 'tilted by 18.5°', 'gaps from 1.08 to 7.00 mm')
    refused(d/'philips_exam_summary_mixed_size', '3 sizes', 'I40')
    s = df.series['ge_tilt18.5_variable_gap']
    x = load_volume(s, regrid=True)
    inv = np.linalg.inv(np.diag([-1,-1,1,1.])@x.affine)
    from scipy.ndimage import map_coordinates
    # each slice again, read off the upright box at its own place
    for k,(o,a) in enumerate(zip(s.frames, fastmed.io.series._frame_images(s.frames))):
        if k%6: continue
        i,j = np.meshgrid(np.arange(0, 512, 4), np.arange(0, 512, 4), indexing='ij')
        w = np.array(o.position)+i[...,None]*o.px[0]*np.array(o.axes[:3])+j[...,None]*o.px[1]*np.array(o.axes[3:])
        w = w@inv[:3,:3].T+inv[:3,3]
        got,want = map_coordinates(x[0].numpy(), np.moveaxis(w, -1, 0), order=1, mode='nearest'),a[::4,::4]
        body = want>-200
        far = np.abs(got-np.roll(want, 2, 1))[body].mean()
        assert np.corrcoef(got[body], want[body])[0,1]>.9 and np.abs(got-want)[body].mean()<.5*far, k

def test_a_damaged_header_is_refused_not_guessed(tmp_path):
    "Bits that do not exist, pixels that are not there, a slice of nothing or of no end"
    def one(name, **kw):
        def each(ds, k):
            for o,v in kw.items(): setattr(ds, o, v)
        d = tmp_path/name
        write(d, np.random.default_rng(0).integers(0, 2000, (14,11,1)), each=each)
        return next(d.iterdir())
    assert load_volume(one('whole')).shape==(1,14,11,1)
    for name,kw,match in (('bits', dict(BitsStored=65535), '65535 bits in each 16'),
            ('short', dict(HighBit=13, BitsStored=12, PixelData=b'\0'*40), 'truncated'),
            ('endless', dict(SliceThickness=1e300), 'size in mm')):
        f = one(name, **kw)
        with pytest.raises(FastmedError, match=match): load_volume(f)
    f = one('thin', SliceThickness='1e-320')
    assert read_header(f)['spacing'][2]==1. and load_volume(f).spacing[2]==1.

@pytest.mark.parametrize('tag,values', [('FrameOfReferenceUID', ('1.2.3','1.2.4')), ('Modality', ('CT','MR')),
        ('PhotometricInterpretation', ('MONOCHROME1','MONOCHROME2')), ('Units', ('BQML','CNTS')),
        ('ConvolutionKernel', ('B30f','B70f')), ('KVP', ('80','120'))])
def test_images_that_do_not_belong_together_are_no_volume(tag, values, tmp_path):
    "They were stacked without a word: two places or two meanings of a number in one volume"
    write(tmp_path, each=lambda ds, k: setattr(ds, tag, values[k%2]))
    with pytest.raises(ValueError, match=tag): load_volume(tmp_path)

def test_two_kernels_at_the_same_places_are_two_parts(tmp_path):
    "One acquisition, reconstructed soft and sharp into one series"
    for kernel,value in (('B30f',10), ('B70f',20)):
        write(tmp_path/kernel, np.full((4,4,3), value), inter=lambda k: 0.,
              uids=dict(series='1.2.3', study='1.2.4', frame='1.2.5'),
              each=lambda ds, _, kernel=kernel: setattr(ds, 'ConvolutionKernel', kernel))
    s = scan_dicom(tmp_path).series[0]
    with pytest.raises(ValueError, match='split.*ConvolutionKernel B30f'): load_volume(s)
    parts = {o.part:float(load_volume(o).max()) for o in s.split()}
    assert parts=={'ConvolutionKernel B30f':10., 'ConvolutionKernel B70f':20.}

@pytest.mark.parametrize('high,signed', [(15,False),(13,False),(15,True)])
def test_values_that_stand_in_the_upper_bits(high, signed, tmp_path):
    "Old scanners leave the lowest bits free and say so by HighBit; both libraries pass over it, the volume was garbage"
    vol = np.random.default_rng(0).integers(-2048*signed, 2048, (14,11,3))
    def each(ds, k):
        ds.HighBit,a = high,vol[:,:,k].T.astype(np.int16).view(np.uint16)
        ds.PixelData = np.ascontiguousarray((a&0xfff)<<(high-11)|0xc000*(high<15)).astype(np.uint16).tobytes()
    want,_ = write(tmp_path/'s', vol, bits=dict(stored=12, signed=signed), each=each)
    assert np.array_equal(load_volume(tmp_path/'s')[0].numpy(), want)
    from fastmed.io.radiographs import load_radiograph
    f = next((tmp_path/'s').iterdir())
    k = int(pydicom.dcmread(f).InstanceNumber)-1
    assert np.array_equal(load_radiograph(f)[0].numpy(), want[:,:,k].T)
    ds = pydicom.dcmread(f)
    ds.HighBit = 7
    ds.save_as(tmp_path/'wrong.dcm')
    with pytest.raises(FastmedError, match='HighBit'): load_volume(tmp_path/'wrong.dcm')
