"Segmentations of what scanners give, and nothing of the patient in them."
import numpy as np
import pytest
import torch

pydicom = pytest.importorskip('pydicom')
hd = pytest.importorskip('highdicom')
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from test_dicom import by_frames, enhanced, write
from test_frames import mosaic

from fastmed.all import InputError, TensorVolumeMask, load_dicom_seg, load_volume, save_dicom_seg, scan_dicom
from fastmed.io.dicom import dicom_series


def mask_on(t, top=3):
    a = np.random.default_rng(5).integers(0, top+1, t.shape[1:])
    return TensorVolumeMask(torch.from_numpy(a), affine=t.affine,
            codes=['background', *(f's{i}' for i in range(1, top+1))])

# ---- enhanced multi-frame images

def parts(data):
    d = data/'dicom_mr'
    return [*dicom_series(d/'siemens_xa10_enhanced').split(), *dicom_series(d/'philips_enhanced'/'fmap.dcm').split()]

def test_real_enhanced_mr_has_segmentations(data, tmp_path):
    "Siemens XA10 and Philips: pixel measures and orientation stand in each frame, and only some frames are used"
    for i,s in enumerate(parts(data)):
        t = load_volume(s)
        m = mask_on(t)
        fn = save_dicom_seg(m, s, tmp_path/f'{i}.dcm')
        assert np.array_equal(load_dicom_seg(fn, s).numpy(), m.numpy()) and np.array_equal(by_frames(fn, t.affine,
                t.shape[1:]), m.numpy())
        source,seg = pydicom.dcmread(s.files[0]),pydicom.dcmread(fn)
        assert [o.ReferencedSOPInstanceUID for o in seg.SourceImageSequence]==[source.SOPInstanceUID]
        for p in seg.PerFrameFunctionalGroupsSequence:
            item = p.DerivationImageSequence[0].SourceImageSequence[0]
            there = source.PerFrameFunctionalGroupsSequence[item.ReferencedFrameNumber-1].PlanePositionSequence[
                    0].ImagePositionPatient
            assert np.allclose(np.array(there, float), np.array(p.PlanePositionSequence[0].ImagePositionPatient, float),
                               atol=1e-3)
            assert item.ReferencedFrameNumber-1 in {o.frame for o in s.frames}

def test_magnitude_and_field_map_have_names(data):
    "They lie at the same places of one file"
    r = scan_dicom(data/'dicom_mr'/'philips_enhanced').iloc[0]
    assert 'T1 M (32 images)' in r.problem and 'T1 FIELD_MAP (32 images)' in r.problem
    a,b = r.series.split()
    assert a.part.endswith('T1 M') and b.part.endswith('T1 FIELD_MAP')
    import nibabel as nib
    for s,name in ((a,'dcm2niix_e1'), (b,'dcm2niix_e2_fieldmap_hz')):
        im = nib.load(data/'dicom_mr'/'philips_enhanced'/f'{name}.nii.gz')
        t = load_volume(s)
        turned = nib.as_closest_canonical(nib.Nifti1Image(t[0].numpy(), t.affine))
        want = nib.as_closest_canonical(im)
        assert np.allclose(turned.affine, want.affine, atol=2e-2)
        # dcm2niix applies the scale of Philips' private elements, so values differ by a line
        assert np.corrcoef(turned.get_fdata().ravel(), want.get_fdata().ravel())[0,1]>.9999

def test_measures_that_stand_in_each_frame(tmp_path):
    "As Siemens, Philips and Canon write them; and a series of several such files"
    def move(fn):
        ds = pydicom.dcmread(fn)
        shared = ds.SharedFunctionalGroupsSequence[0]
        for p in ds.PerFrameFunctionalGroupsSequence:
            p.PixelMeasuresSequence,p.PlaneOrientationSequence = (shared.PixelMeasuresSequence,
                    shared.PlaneOrientationSequence)
        del shared.PixelMeasuresSequence, shared.PlaneOrientationSequence
        ds.save_as(fn)
        return ds
    enhanced(tmp_path/'one.dcm', order=[3,0,5,1,4,2])
    whole = move(tmp_path/'one.dcm')
    s = dicom_series(tmp_path/'one.dcm')
    m = mask_on(load_volume(s))
    assert np.array_equal(load_dicom_seg(save_dicom_seg(m, s, tmp_path/'o'/'seg.dcm'), s).numpy(), m.numpy())
    assert np.array_equal(load_dicom_seg(save_dicom_seg(m, s, tmp_path/'o'/'k.dcm', strip_identity=False), s).numpy(),
                                                        m.numpy())
    (tmp_path/'many').mkdir()
    size = len(whole.PixelData)//6
    for k in range(6):
        ds = pydicom.dcmread(tmp_path/'one.dcm')
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        ds.NumberOfFrames,ds.PixelData = 1,whole.PixelData[k*size:(k+1)*size]
        ds.PerFrameFunctionalGroupsSequence = Sequence([ds.PerFrameFunctionalGroupsSequence[k]])
        ds.save_as(tmp_path/'many'/f'{k}.dcm')
    s = dicom_series(tmp_path/'many')
    fn = save_dicom_seg(m, s, tmp_path/'o'/'many.dcm')
    assert np.array_equal(load_dicom_seg(fn, s).numpy(), m.numpy())
    seg,there = pydicom.dcmread(fn),{pydicom.dcmread(f).SOPInstanceUID for f in s.files}
    assert {o.ReferencedSOPInstanceUID for o in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}==there
    assert {p.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            for p in seg.PerFrameFunctionalGroupsSequence}==there

def test_a_mosaic_has_no_segmentation(tmp_path):
    mosaic(tmp_path/'m.dcm', np.ones((8,6,5), int))
    with pytest.raises(InputError, match='mosaic.*save_volume'):
        save_dicom_seg(mask_on(load_volume(tmp_path/'m.dcm')), tmp_path/'m.dcm', tmp_path/'x.dcm')

# ---- tilted series

@pytest.mark.parametrize('kw', [dict(shear=np.tan(np.radians(18))), dict(at=(0,2,4,6.7,8.7,10.7,12.7)),
        dict(shear=-.3, at=(0,2,4,6.7,8.7,10.7,12.7), plane='oblique')])
def test_segmentation_of_a_tilted_series_is_read_back(kw, tmp_path):
    write(tmp_path/'s', np.random.default_rng(0).integers(0, 900, (40,36,7)), **kw)
    t = load_volume(tmp_path/'s', regrid=True)
    a = np.zeros(t.shape[1:], np.uint8)
    a[8:30,14:26,1:-1] = 1
    a[12:20,16:20,2:-2] = 2
    m = TensorVolumeMask(torch.from_numpy(a), affine=t.affine, codes=['background','large','small'])
    fn = save_dicom_seg(m, tmp_path/'s', tmp_path/'seg.dcm')
    with pytest.raises(InputError, match='regrid=True'): load_dicom_seg(fn, tmp_path/'s')
    b = load_dicom_seg(fn, tmp_path/'s', regrid=True)
    assert b.shape==m.shape and np.array_equal(b.affine, t.affine) and b.codes==m.codes
    for i in (1,2): assert 2*((b==i)&(m==i)).sum()/((b==i).sum()+(m==i).sum())>.85
    again = load_dicom_seg(save_dicom_seg(b, tmp_path/'s', tmp_path/'again.dcm'), tmp_path/'s', regrid=True)
    assert 2*((b==1)&(again==1)).sum()/((b==1).sum()+(again==1).sum())>.95

# ---- identity

MARK = 'ZQXV'
def marker(vr):
    "A value of that kind which nobody would write by chance; None where there is none"
    if vr in ('LO','SH','LT','ST','UT','UC','CS','PN','AE','UR'): return MARK+'7'
    return dict(DA='19430217', TM='041337', DT='19430217041337', AS='097Y', DS='97.4133', IS='974133',
                UI='1.2.974133.974133').get(vr)

def plant(ds, skip):
    """Every element of the standard that `ds` has not, in the groups that describe patient, study, series, equipment
    and image"""
    for tag,(vr,_vm,_name,_retired,keyword) in DicomDictionary.items():
        if tag>>16 not in (0x0008,0x0010,0x0012,0x0018,0x0020,0x0032,0x0038,0x0040,0x0054,0x0088,0x0400,
                           0x4008) or not keyword or keyword in skip or keyword in ds:
            continue
        if vr=='SQ':
            item = Dataset()
            item.CodeValue,item.CodingSchemeDesignator,item.CodeMeaning = MARK+'1',MARK+'2',MARK+'3'
            item.InstitutionName,item.PatientID,item.StudyDate = MARK+'4',MARK+'5','19430217'
            setattr(ds, keyword, Sequence([item]))
        elif marker(vr): ds.add_new(tag, vr, marker(vr))

def found(b): return [o for o in (MARK,'19430217','041337','097Y','97.4133','974133') if o.encode() in b]

@pytest.mark.parametrize('kind', ['slices','multi-frame'])
def test_nothing_of_the_patient_is_in_a_segmentation(kind, tmp_path):
    """Each element of the standard holds a marker in the source, and none is in the segmentation (PS3.15, table E.1-1);
    UIDs by which it is found stay"""
    skip = ('SpecificCharacterSet','TimezoneOffsetFromUTC','NumberOfFrames','ImagePositionVolume','FrameOfReferenceUID',
            'SOPClassUID','SpacingBetweenSlices','TransferSyntaxUID','GridFrameOffsetVector','RescaleType',
            'ImagerPixelSpacing','NominalScannedPixelSpacing','ImagePlanePixelSpacing','ImageOrientationPatient',
            'ImagePositionPatient','PixelSpacing','SliceThickness','PlanePositionSequence','PlaneOrientationSequence')
    def each(ds, k=0):
        for o in ('PatientName','PatientID','PatientSex','PatientBirthDate','ReferringPhysicianName','AccessionNumber',
                  'StudyID','InstitutionName','StudyDate','StudyTime','SeriesDescription','Manufacturer',
                  'PositionReferenceIndicator'):
            ds.pop(o, None)
        plant(ds, skip)
        ds.add_new(0x00091001, 'LO', MARK)
        ds.add_new(0x00090010, 'LO', MARK)
    if kind=='slices':
        src = tmp_path/'s'
        write(src, each=each)
    else:
        src = tmp_path/'e.dcm'
        enhanced(src)
        ds = pydicom.dcmread(src)
        each(ds)
        for d in (*ds.PerFrameFunctionalGroupsSequence, *ds.SharedFunctionalGroupsSequence): plant(d, skip)
        ds.save_as(src)
    s = dicom_series(src)
    assert found(s.files[0].read_bytes())
    m = mask_on(load_volume(s))
    fn = save_dicom_seg(m, s, tmp_path/'o'/'seg.dcm')
    assert found(fn.read_bytes())==[]
    assert np.array_equal(load_dicom_seg(fn, s).numpy(), m.numpy())
    seg,head = pydicom.dcmread(fn),pydicom.dcmread(s.files[0])
    assert seg.StudyInstanceUID==head.StudyInstanceUID and seg.FrameOfReferenceUID==head.FrameOfReferenceUID
    assert seg.PatientIdentityRemoved=='YES' and {o.CodeValue
            for o in seg.DeidentificationMethodCodeSequence}=={'113100','113110'}

def test_the_day_of_the_segmentation_is_not_in_it(tmp_path):
    "Made on the day of the scan it would tell the day of the scan; whole dates stay where identity is kept"
    import datetime
    write(tmp_path/'s')
    m = mask_on(load_volume(tmp_path/'s'))
    today = f'{datetime.date.today():%Y%m%d}'.encode()
    assert today not in save_dicom_seg(m, tmp_path/'s', tmp_path/'a.dcm').read_bytes()
    kept = pydicom.dcmread(save_dicom_seg(m, tmp_path/'s', tmp_path/'b.dcm', strip_identity=False))
    assert kept.StudyDate=='20200101' and kept.ContentDate!='19000101'

def test_prediction_takes_regrid(tmp_path, loaders, weights):
    "A tilted series is predicted where `regrid=True` says so, and is refused where nothing does"
    from fastmed.all import unet3d_learner
    learn = unet3d_learner(loaders[3], nf=4, depth=2)
    write(tmp_path/'s', np.random.default_rng(0).integers(0, 900, (20,18,9)), px=(1.,1.), gap=1.5, shear=.4)
    with pytest.raises(InputError, match='regrid=True'): learn.predict_volume(tmp_path/'s')
    m = learn.predict_volume(tmp_path/'s', regrid=True)
    t = load_volume(tmp_path/'s', regrid=True)
    assert m.shape==t.shape[1:] and np.array_equal(m.affine, t.affine)

def test_a_segmentation_of_somebody_else_is_refused(tmp_path):
    "Slices of two patients often lie at the same numbers: the mask of one was read onto the other"
    write(tmp_path/'a')
    write(tmp_path/'b')
    m = mask_on(load_volume(tmp_path/'a'))
    fn = save_dicom_seg(m, tmp_path/'a', tmp_path/'seg.dcm')
    assert np.array_equal(load_dicom_seg(fn, tmp_path/'a').numpy(), m.numpy())
    with pytest.raises(InputError, match='frame of reference'): load_dicom_seg(fn, tmp_path/'b')
