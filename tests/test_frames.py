"What one DICOM file holds: mosaics, values by a table, colour by run lengths, links between folders."
import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pydicom = pytest.importorskip('pydicom')
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import MRImageStorage, generate_uid
from test_dicom import axes_of, header, pixels, refused, write

from fastmed.all import InputError, load_radiograph, load_volume, read_header, scan_dicom
from fastmed.core import FileError
from fastmed.io.dicom import dicom_series
from fastmed.io.formats import picture_pixels

LPS = np.diag([-1,-1,1,1.])

def csa(**tags):
    "A CSA header of the second kind with those tags, each a list of texts"
    res = b'SV10\4\3\2\1'+struct.pack('<2I', len(tags), 77)
    for name,values in tags.items():
        res += struct.pack('<64si4s3i', name.encode(), len(values), b'US\0\0' if len(values)==1 else b'FD\0\0', 4, 6,
                           77)
        for v in [*values, *['']*(6-len(values))]:
            b = v.encode()+b'\0' if v else b''
            res += struct.pack('<4i', len(b), len(b), 77, len(b))+b+bytes(-len(b)%4)
    return res

def mosaic(fn, vol, plane='axial', px=(2.,3.), gap=4., origin=(-30.,20.,100.), down=False, ids=None, number=1, **kw):
    "The slices of `vol` (columns, rows, n) as tiles; gives the affine of the volume as its slices are numbered"
    r,q,n = axes_of(plane)
    if down: n = -n
    w,h,count = vol.shape
    across = int(np.ceil(np.sqrt(count)))
    sheet = np.zeros((w*across, h*across), int)
    for k in range(count):
        x,y = k%across*w,k//across*h
        sheet[x:x+w, y:y+h] = vol[...,k]
    ds = pixels(header(cls=MRImageStorage, modality='MR', **(ids or {})), sheet)
    corner = np.array(origin)-r*px[0]*(across-1)*w/2-q*px[1]*(across-1)*h/2
    ds.ImageType = ['ORIGINAL','PRIMARY','M','ND','MOSAIC']
    ds.ImagePositionPatient = [f'{o:.8g}' for o in corner]
    ds.ImageOrientationPatient = [f'{o:.9f}'[:16] for o in (*r,*q)]
    ds.PixelSpacing,ds.SliceThickness,ds.SpacingBetweenSlices = [px[1],px[0]],gap-1,gap
    ds.InstanceNumber = ds.AcquisitionNumber = number
    block = ds.private_block(0x29, 'SIEMENS CSA HEADER', create=True)
    block.add_new(0x10, 'OB', csa(NumberOfImagesInMosaic=[str(count)], SliceNormalVector=[f'{o:.8f}' for o in n]))
    for k,v in kw.items():
        if v is None: delattr(ds, k)
        else: setattr(ds, k, v)
    ds.save_as(fn, enforce_file_format=True)
    aff = np.eye(4)
    aff[:3,:3],aff[:3,3] = np.stack([r*px[0], q*px[1], n*gap], 1),origin
    return LPS@aff

def same_in_space(t, vol, aff):
    "Whether every voxel of `vol` on `aff` is found at its place in `t`"
    ijk = np.stack(np.meshgrid(*map(np.arange, vol.shape), indexing='ij'), -1).reshape(-1, 3)
    at = np.c_[ijk, np.ones(len(ijk))]@(np.linalg.inv(t.affine)@aff).T
    near = at[:,:3].round().astype(int)
    assert np.abs(at[:,:3]-near).max()<.01
    return np.array_equal(t[0].numpy()[tuple(near.T)], vol[tuple(ijk.T)])

# ---- mosaics

def test_mosaic_as_dcm2niix_reads_it(data):
    d = data/'dicom_mr'/'siemens_mosaic'
    im = nib.load(d/'dcm2niix.nii.gz')
    t = load_volume(d/'mosaic.dcm')
    assert t.shape==(1,90,90,60) and np.allclose(t.spacing, 2.4, atol=1e-4)
    assert same_in_space(t, im.get_fdata(dtype=np.float32), im.affine)
    assert np.allclose(t.affine[:3,3], (110.1792,116.6223,-64.0736), atol=1e-3)
    assert read_header(d/'mosaic.dcm')['shape']==(90,90,60)

@pytest.mark.parametrize('name', ['siemens_dwi_0','siemens_dwi_1000'])
def test_mosaic_as_nibabel_reads_it(name, tmp_path):
    "Two real mosaics that nibabel carries: oblique, 48 of 64 tiles"
    from nibabel.nicom import dicomwrappers
    packed = Path(nib.__file__).parent/'nicom'/'tests'/'data'/f'{name}.dcm.gz'
    if not packed.is_file(): pytest.skip('nibabel without its test data')
    (tmp_path/'m.dcm').write_bytes(gzip.decompress(packed.read_bytes()))
    w = dicomwrappers.wrapper_from_file(tmp_path/'m.dcm')
    t = load_volume(tmp_path/'m.dcm')
    assert t.shape==(1,128,128,48)
    # nibabel counts rows first
    assert same_in_space(t, w.get_data().transpose(1,0,2), LPS@w.affine@np.eye(4)[[1,0,2,3]])

@pytest.mark.parametrize('plane', ['axial','coronal','sagittal','flipped','oblique'])
@pytest.mark.parametrize('down', [False,True])
@pytest.mark.parametrize('n', [2,5,9,17])
def test_mosaics_of_other_sizes(plane, down, n, tmp_path):
    vol = np.random.default_rng(n).integers(1, 4000, (10,6,n))
    aff = mosaic(tmp_path/'m.dcm', vol, plane, down=down)
    t = load_volume(tmp_path/'m.dcm')
    assert t.shape==(1,10,6,n) and same_in_space(t, vol, aff)
    r = scan_dicom(tmp_path).iloc[0]
    assert r['shape']==(10,6,n) and r.problem==''

def test_mosaics_of_a_time_series_are_parted(tmp_path):
    ids = dict(series=generate_uid(), study=generate_uid(), frame=generate_uid())
    vols = [np.random.default_rng(i).integers(1, 4000, (8,6,5)) for i in range(3)]
    for i,v in enumerate(vols): aff = mosaic(tmp_path/f'{i}.dcm', v, 'oblique', ids=ids, number=i+1)
    refused(tmp_path, 'one image a position', 'AcquisitionNumber (1, 2, 3)', 'split')
    parts = dicom_series(tmp_path).split()
    assert len(parts)==3 and all(same_in_space(load_volume(p), v, aff) for p,v in zip(parts, vols))

def change(fn, f):
    ds = pydicom.dcmread(fn)
    f(ds)
    ds.save_as(fn)

@pytest.mark.parametrize('what,match', [
    ('csa', 'NumberOfImagesInMosaic is missing'), ('normal', 'SliceNormalVector is missing'),
        ('position', 'ImagePositionPatient is missing'),
    ('spacing', 'SpacingBetweenSlices is missing'), ('count', 'header disagrees: 5 tiles'), ('size', 'equal tiles'),
        ('turned', 'not the normal')])
def test_mosaic_whose_header_lost_what_places_it_is_refused_by_name(what, match, tmp_path):
    fn = tmp_path/'m.dcm'
    mosaic(fn, np.ones((8,6,5), int))
    def lose(ds):
        if what=='csa': del ds[0x29,0x1010]
        if what=='normal': ds[0x29,0x1010].value = csa(NumberOfImagesInMosaic=['5'])
        if what=='position': del ds.ImagePositionPatient
        if what=='spacing': del ds.SpacingBetweenSlices
        if what=='count': ds.private_block(0x19, 'SIEMENS MR HEADER', create=True).add_new(0x0a, 'US', 7)
        if what=='size': ds.Columns,ds.PixelData = 23,ds.PixelData[:23*18*2]
        if what=='turned': ds.ImageOrientationPatient = [1,0,0,0,0,-1]
    change(fn, lose)
    message = refused(fn, 'tiles', match, 'dcm2niix')
    assert str(fn) in message
    assert match in scan_dicom(tmp_path).problem[0]
    with pytest.raises(InputError, match='tiles'): read_header(fn)

def test_mosaic_that_no_longer_says_so_is_still_one(tmp_path):
    "ImageType without MOSAIC, the count in the private elements of the scanner"
    vol = np.random.default_rng(0).integers(1, 4000, (8,6,5))
    aff = mosaic(tmp_path/'m.dcm', vol, ImageType=['DERIVED','SECONDARY'])
    change(tmp_path/'m.dcm', lambda ds: ds.private_block(0x19, 'SIEMENS MR HEADER', create=True).add_new(0x0a, 'US', 5))
    assert same_in_space(load_volume(tmp_path/'m.dcm'), vol, aff)

def test_united_imaging_grid_is_refused_by_name(tmp_path):
    mosaic(tmp_path/'m.dcm', np.ones((8,6,5), int), ImageType=['ORIGINAL','PRIMARY','M'])
    def grid(ds):
        del ds[0x29,0x1010]
        ds.private_block(0x65, 'Image Private Header', create=True).add_new(0x50, 'DS', '5')
    change(tmp_path/'m.dcm', grid)
    refused(tmp_path/'m.dcm', 'grid of United Imaging', 'dcm2niix')

# ---- sizes in mm

def test_ct_without_pixel_spacing_is_refused(tmp_path):
    "Not taken for pixels of 1 mm"
    write(tmp_path/'s', each=lambda ds,k: delattr(ds, 'PixelSpacing'))
    refused(tmp_path/'s', 'PixelSpacing (0028,0030)', '7 of its 7 images')
    assert 'PixelSpacing (0028,0030)' in scan_dicom(tmp_path/'s').problem[0]
    write(tmp_path/'one', np.ones((5,4,1), int), each=lambda ds,k: delattr(ds, 'PixelSpacing'))
    refused(tmp_path/'one', 'PixelSpacing (0028,0030)')
    write(tmp_path/'some', each=lambda ds,k: delattr(ds, 'PixelSpacing') if k==2 else None)
    refused(tmp_path/'some', 'PixelSpacing (0028,0030)', '1 of its 7 images')
    write(tmp_path/'zero', each=lambda ds,k: setattr(ds, 'PixelSpacing', [0,0]))
    refused(tmp_path/'zero', 'PixelSpacing (0028,0030)')

# ---- values by a table

def with_lut(ds, first, table, bits=16, vr='OW'):
    item = Dataset()
    item.LUTDescriptor,item.ModalityLUTType = [len(table),first,bits],'US'
    item.add_new(0x00283006, vr, table if vr=='US' else np.array(table, '<u2').tobytes())
    ds.ModalityLUTSequence = Sequence([item])
    for k in ('RescaleSlope','RescaleIntercept'):
        if k in ds: delattr(ds, k)

@pytest.mark.parametrize('vr', ['OW','US'])
def test_modality_lut_gives_the_values(vr, tmp_path):
    table = [5,100,90,1000]
    vol = np.random.default_rng(0).integers(0, 8, (6,5,4))
    write(tmp_path/'s', vol, each=lambda ds,k: with_lut(ds, 2, table, vr=vr))
    want = np.array(table)[np.clip(vol-2, 0, 3)]
    assert np.array_equal(load_volume(tmp_path/'s')[0].numpy(), want)
    ds = pydicom.dcmread(next((tmp_path/'s').iterdir()))
    from pydicom.pixels import apply_modality_lut
    assert set(np.unique(apply_modality_lut(ds.pixel_array, ds)))<=set(table)

def test_modality_lut_of_a_radiograph(tmp_path):
    a = np.random.default_rng(0).integers(0, 8, (6,5))
    ds = pixels(header(modality='DX', cls='1.2.840.10008.5.1.4.1.1.1.1'), a)
    table = [5,100,90,1000,7,8,9,10]
    with_lut(ds, 0, table)
    ds.save_as(tmp_path/'x.dcm', enforce_file_format=True)
    assert np.array_equal(load_radiograph(tmp_path/'x.dcm', window='full')[0].numpy(), np.array(table)[a.T])
    assert np.array_equal(load_volume(tmp_path/'x.dcm')[0,...,0].numpy(), np.array(table)[a])

@pytest.mark.parametrize('function', [None, 'LINEAR', 'LINEAR_EXACT', 'SIGMOID'])
def test_the_window_of_a_radiograph_has_its_function(function, tmp_path):
    "As pydicom shows it; a window that is said is linear"
    from pydicom.pixels import apply_windowing
    a = np.arange(0, 240, 8).reshape(6, 5)
    ds = pixels(header(modality='DX', cls='1.2.840.10008.5.1.4.1.1.1.1'), a)
    ds.WindowCenter,ds.WindowWidth = 100,80
    if function: ds.VOILUTFunction = function
    ds.save_as(tmp_path/'x.dcm', enforce_file_format=True)
    ds = pydicom.dcmread(tmp_path/'x.dcm')
    want = apply_windowing(ds.pixel_array, ds)/(2**ds.BitsStored-1)
    assert np.allclose(load_radiograph(tmp_path/'x.dcm')[0].numpy(), want, atol=1e-5)
    linear = np.clip((a.T-99.5)/79+.5, 0, 1)
    assert np.allclose(load_radiograph(tmp_path/'x.dcm', window=(100, 80))[0].numpy(), linear, atol=1e-5)

def test_a_window_of_an_unknown_function_is_refused(tmp_path):
    ds = pixels(header(modality='DX', cls='1.2.840.10008.5.1.4.1.1.1.1'), np.arange(30).reshape(6, 5))
    ds.WindowCenter,ds.WindowWidth,ds.VOILUTFunction = 10,8,'CUBIC'
    ds.save_as(tmp_path/'x.dcm', enforce_file_format=True)
    with pytest.raises(InputError, match="VOILUTFunction.*'CUBIC'.*window="): load_radiograph(tmp_path/'x.dcm')

# ---- colour

@pytest.mark.parametrize('name', ['SC_rgb_rle', 'SC_rgb_rle_16bit', 'SC_rgb_rle_32bit'])
def test_colour_packed_by_run_lengths_keeps_its_colours(name, tmp_path):
    "One picture of stripes, in 8, 16 and 32 bits"
    folder = Path(pydicom.__file__).parent/'data'/'test_files'
    fn = folder/f'{name}.dcm'
    if not fn.is_file(): pytest.skip('pydicom without its test data')
    ds = pydicom.dcmread(fn)
    top = 2.**ds.BitsAllocated-1
    want = pydicom.dcmread(folder/'SC_rgb_rle.dcm').pixel_array/255
    t = load_volume(fn)
    assert np.allclose(t[...,0].numpy().transpose(2,1,0)/top, want, atol=1e-6)
    assert (picture_pixels(fn) is None)==(name=='SC_rgb_rle')
    grey = load_radiograph(fn, window='full', color='grey')[0].numpy()
    assert np.allclose(grey/top, want@np.array([.299,.587,.114]), atol=1e-5)

# ---- what a tree holds

def test_linked_folders_are_scanned_once(tmp_path):
    far,tree = tmp_path/'far',tmp_path/'tree'
    vol,_ = write(far/'s')
    write(tree/'z')
    (tree/'link').symlink_to(far, target_is_directory=True)
    (tree/'again').symlink_to(far, target_is_directory=True)
    (tree/'z'/'up').symlink_to(tree, target_is_directory=True)
    (tree/'a').symlink_to(tree/'z', target_is_directory=True)
    df = scan_dicom(tree)
    assert len(df)==2 and (df.slices==7).all() and (df.problem=='').all()
    assert 'z' in set(df.folder)
    assert any(np.array_equal(load_volume(s)[0].numpy(), vol) for s in df.series)

@pytest.mark.parametrize('cls,modality,name', [
    ('1.2.840.10008.5.1.4.1.1.481.3','RTSTRUCT','RT Structure Set Storage'),
        ('1.2.840.10008.5.1.4.1.1.481.5','RTPLAN','RT Plan Storage'),
    ('1.2.840.10008.5.1.4.1.1.88.11','SR','Basic Text SR Storage')])
def test_what_holds_no_image_is_named(cls, modality, name, tmp_path):
    write(tmp_path/'s')
    header(cls=cls, modality=modality).save_as(tmp_path/'s'/'other', enforce_file_format=True)
    df = scan_dicom(tmp_path)
    assert df.attrs['no_image']==1 and df.attrs['kinds']=={name:1}
    for f in (load_volume, scan_dicom):
        with pytest.raises(FileError, match=name): f(tmp_path/'s'/'other')

def test_missing_photometric_interpretation_is_named(tmp_path):
    write(tmp_path/'s', each=lambda ds,k: delattr(ds, 'PhotometricInterpretation') if k==3 else None)
    with pytest.raises(FileError, match=r'lacks PhotometricInterpretation \(0028,0004\)') as e:
        load_volume(tmp_path/'s')
    assert 'truncated' not in str(e.value)

def test_split_is_advised_where_it_parts(tmp_path):
    ids = dict(series=generate_uid(), study=generate_uid(), frame=generate_uid())
    write(tmp_path/'px', uids=ids)
    write(tmp_path/'px', uids=ids, px=(.5,.5), names=lambda k: f'x{k}')
    refused(tmp_path/'px', 'several sizes', 'split')
    parts = dicom_series(tmp_path/'px').split()
    assert [len(o) for o in parts]==[7,7] and len({o.key for o in parts})==2
    assert {tuple(round(float(v), 2) for v in load_volume(o).spacing[:2]) for o in parts}=={(.7,.9),(.5,.5)}
    at = (0,2,4,4.008,6,8,10)                              # rounding alone keeps two of them apart
    write(tmp_path/'near', at=at)
    message = refused(tmp_path/'near', 'one image a position')
    parts = dicom_series(tmp_path/'near').split()
    assert ('split()' in message)==(len(parts)>1)

def test_a_missing_image_is_not_filled_from_the_next_turn(tmp_path):
    "Two turns that no tag tells apart, one image missing: the first looked whole, with an image of the second in it"
    ids = dict(series=generate_uid(), study=generate_uid(), frame=generate_uid())
    for i in range(2):
        write(tmp_path/'s', uids=ids, seed=i, names=lambda k, i=i: f'{i}_{k}',
                each=lambda ds, k, i=i: setattr(ds, 'InstanceNumber', 7*i+k+1), drop=() if i else (3,))
    assert len(dicom_series(tmp_path/'s').split())==1
    refused(tmp_path/'s', 'one image a position', 'Nothing in its headers tells them apart')

def test_missing_orientation_is_named(tmp_path):
    write(tmp_path/'s', each=lambda ds, k: delattr(ds, 'ImageOrientationPatient') if k==2 else None)
    refused(tmp_path/'s', '1 of its 7 images carry no orientation (ImageOrientationPatient)')

@pytest.mark.parametrize('meta', [True, False])
def test_files_without_a_preamble_are_read(meta, tmp_path):
    "As older archives write them: they begin with the elements of group 0002 or 0008"
    vol,aff = write(tmp_path/'s')
    for f in (tmp_path/'s').iterdir():
        b = f.read_bytes()[132:]
        f.write_bytes(b if meta else b[12+struct.unpack('<I', b[8:12])[0]:])
    v = load_volume(tmp_path/'s')
    assert np.array_equal(v[0].numpy(), vol) and np.allclose(v.affine, aff, atol=1e-4)
