"Labels of cases: which block, which split, the whole scan as an item, radiographs as they were meant."
import math
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import affine_of, write_case
from PIL import Image

from fastmed.all import *
from fastmed.core import FastmedError, MissingFileError
from fastmed.data.labels import TensorRegression, label_block, label_splitter
from fastmed.data.radiographs import RadiographPrep, ShiftTfm

for k in [o for o in globals() if o.startswith('test')]: del globals()[k]    # fastcore's own

QUIET = dict(device='cpu', num_workers=0)

@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    "Twelve phantoms of six subjects with labels of every kind"
    path = tmp_path_factory.mktemp('cases')
    rows = [dict(write_case(path, f'c{i:02}', affine_of('RAS', (1,1,1)), (16+2*(i%3),18,12), seed=i),
            subject=f's{i//2}', view=['AP','PA'][i%2], sick=bool(i%3), age=20.+3*i, grade=i%3, a=i%2, b=(i//2)%2,
            finds='|'.join(['Mass']*(i%2)+['Edema']*(i//2%2))) for i in range(12)]
    return path,pd.DataFrame(rows)

def loaders(cases, cls=VolumeDataLoaders, **kw):
    path,df = cases
    return cls.from_df(kw.pop('df', df), path, **{**QUIET, 'bs':4, 'cache':path/'cache', 'valid_pct':.34, **kw})

# ---- blocks

@pytest.mark.parametrize('col,delim,kind,vocab',
        [('view',None,'category',['AP','PA']), ('sick',None,'category',[False,True]), ('grade',None,'category',[0,1,2]),
        ('age',None,'regression',['age']),
                                                  (['a','b'],None,'multi',['a','b']),
        ('finds','|','multi',['Edema','Mass']), (['age','a'],None,'regression',['age','a'])])
def test_block_follows_from_the_column(cases, col, delim, kind, vocab):
    dls = loaders(cases, label_col=col, label_delim=delim)
    assert (dls.task, list(dls.vocab), dls.c)==(kind, vocab, len(vocab))
    x,y = dls.one_batch()
    assert isinstance(x, TensorVolume) and x.shape==(4,1,*dls.plan.patch)
    assert y.shape==((4,) if kind=='category' else (4,len(vocab)))
    assert isinstance(y, dict(category=TensorCategory, multi=TensorMultiCategory, regression=TensorRegression)[kind])

@pytest.mark.parametrize('y_block', ['regression', RegressionBlock, RegressionBlock()])
def test_y_block_says_otherwise(cases, y_block):
    dls = loaders(cases, label_col='grade', y_block=y_block)
    assert dls.task=='regression' and set(dls.valid_ds.items.grade)>={0} and dls.one_batch()[1].dtype==torch.float32
def test_y_block_category_of_floats(cases):
    assert loaders(cases, df=cases[1].assign(f=cases[1].grade.astype(float)), label_col='f',
                   y_block='category').vocab==[0.,1.,2.]
def test_order_of_a_categorical_is_kept(cases):
    assert loaders(cases, df=cases[1].assign(view=pd.Categorical(cases[1]['view'], ['PA','AP'])),
            label_col='view').vocab==['PA','AP']

@pytest.mark.parametrize('kw,words',
        [(dict(df=lambda d: d.assign(view=[None]+d['view'].tolist()[1:]), label_col='view'), "'c00' has no view"),
        (dict(df=lambda d: d.assign(age=[math.nan]+d.age.tolist()[1:]), label_col='age'), "'c00' has no age"),
    (dict(df=lambda d: d.assign(view='AP'), label_col='view'), 'two classes'), (dict(label_col='vew'), 'vew'),
        (dict(label_col='view', y_block='best'), 'best'), (dict(label_col='view', y_block='regression'), 'number'),
    (dict(label_col='view', patch=16), 'patch'), (dict(size=16), 'label_col'), (dict(label_col='view', size=2), 'size'),
        (dict(label_col=['view','sick']), 'text'), (dict(label_col='case'), 'classes in'),
    (dict(df=lambda d: d.assign(rare=['x']+['y']*11, v=[True]*2+[False]*10), label_col='rare', valid_col='v'),
     "no training case is 'x'")])
def test_labels_that_cannot_be_used(cases, kw, words):
    df = kw.get('df', lambda d: d)(cases[1])
    with pytest.raises(FastmedError, match=words): loaders(cases, **{**kw, 'df':df})

# ---- split

def test_without_labels_nothing_changed(cases):
    dls = loaders(cases, spacing=1., patch=8, samples_per_case=1, codes=['background','large','small'])
    x,y = dls.valid.one_batch()
    assert dls.task=='mask' and isinstance(y, TensorVolumeMask) and dls.vocab==['background','large',
            'small'] and dls.c==3

@pytest.mark.parametrize('seed', range(5))
def test_stratified_groups(seed):
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(dict(subject=rng.integers(80, size=240).astype(str),
            y=rng.choice(['a','b','c'], 240, p=[.6,.3,.1]), x=rng.normal(size=240)))
    for col,kind in (('y','category'),('x','regression')):
        tr,va = label_splitter(df, col, kind, seed=seed)(df)
        assert not set(df.subject[tr])&set(df.subject[va]) and sorted([*tr,*va])==list(range(240)) and abs(len(va)/240
                -.2)<.03
        if kind=='category':
            assert (df.y[va].value_counts(normalize=True)-df.y.value_counts(normalize=True)).abs().max()<.05
    assert list(va)!=list(label_splitter(df, 'x', 'regression', seed=seed+1)(df)[1])
    shuffled = df.sample(frac=1, random_state=1)
    v2 = label_splitter(shuffled.reset_index(drop=True), 'y', 'category', seed=seed)(df)[1]
    assert set(shuffled.subject.iloc[v2])==set(df.subject[label_splitter(df, 'y', 'category',
            seed=seed)(df)[1]]), 'the order of the rows changes the split'

def test_group_col_and_valid_col(cases):
    dls = loaders(cases, label_col='view', group_col='subject')
    assert not set(dls.train_ds.items.subject)&set(dls.valid_ds.items.subject)
    with pytest.raises(InputError, match='both sides'):
        loaders(cases, df=cases[1].assign(v=[True]+[False]*11), label_col='view', valid_col='v')

# ---- the whole scan

def test_nothing_is_cropped(cases):
    "A voxel in each corner of the scan is still there, whatever the size"
    for shape,size in (((20,10,14),(24,24,24)), ((20,10,14),(10,10,10)), ((9,30,12),(16,16,16)), ((8,8,8),(8,8,8))):
        x = TensorVolume(torch.zeros(1, *shape), affine=np.eye(4))
        for c in ((0,0,0),(-1,-1,-1),(0,-1,0)): x.as_subclass(Tensor)[(0,*c)] = 100.
        y = WholeTransform(Plan(ndim=3, patch=size, spacing=None, whole=True))(x)
        assert tuple(y.shape)==(1,*size) and len(y.unique())>1
        h = [s//2 for s in size]
        assert all(y[(0,*[slice(None,k) if c==0 else slice(k,None) for c,k in zip(cc, h)])].max()>y.min()
                   for cc in ((0,0,0),(-1,-1,-1),(0,-1,0))), (shape, size)

def test_larger_training_case_is_told(cases):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        loaders(cases, label_col='view', size=12, spacing=1.)
    assert any('not cropped' in str(o.message) for o in w)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        dls = loaders(cases, label_col='view', size=12)
    assert not any('not cropped' in str(o.message) for o in w) and dls.plan.spacing[0]>1 and dls.plan.patch==(12,12,12)

def test_slices(cases):
    dls = loaders(cases, SliceDataLoaders, label_col='view', axis=2, context=1, samples_per_case=3)
    x,y = dls.one_batch()
    assert isinstance(x, TensorSlice) and x.shape==(4,3,*dls.plan.patch[:2]) and len(dls.train)==len(dls.train_ds)*3//4
    a,b = dls.valid.one_batch()[0],dls.valid.one_batch()[0]
    assert torch.equal(a, b)
    e1,e2 = [torch.cat([b[0] for b in dls.train]).shape for _ in range(2)]
    assert e1==e2

def test_mask_and_label(cases):
    dls = loaders(cases, mask_col='mask', label_col='view', codes=['background','large','small'], size=16)
    x,m,y = dls.one_batch()
    assert x.shape[2:]==m.shape[1:]==(16,16,16) and isinstance(m, TensorVolumeMask) and isinstance(y, TensorCategory)
    dls.show_batch(max_n=2)

def test_item_does_not_reach_the_store(cases):
    dls = loaders(cases, label_col='view')
    a = dls.train_ds[0][0].clone()
    it = dls.train.do_item(0)
    it[0].as_subclass(Tensor).fill_(7.)
    assert torch.equal(a.as_subclass(Tensor), dls.train_ds[0][0].as_subclass(Tensor))

# ---- radiographs

RAMP = np.tile(np.linspace(1000, 5000, 64).astype(np.uint16), (32,1))

def dicom(fn, a, photometric, window=None, slope=None, bits=None, signed=False):
    pytest.importorskip('pydicom')
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    m = FileMetaDataset()
    m.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.1.1'
    m.MediaStorageSOPInstanceUID = generate_uid()
    m.TransferSyntaxUID = ExplicitVRLittleEndian
    d = FileDataset(str(fn), {}, file_meta=m, preamble=b'\0'*128)
    d.SOPClassUID,d.SOPInstanceUID = m.MediaStorageSOPClassUID,m.MediaStorageSOPInstanceUID
    d.Modality,d.PatientID = 'DX','1'
    d.StudyInstanceUID,d.SeriesInstanceUID = generate_uid(),generate_uid()
    d.Rows,d.Columns = a.shape
    d.SamplesPerPixel = 1
    d.PhotometricInterpretation = photometric
    b = a.dtype.itemsize*8
    d.BitsAllocated = b
    d.BitsStored = bits or b
    d.HighBit = (bits or b)-1
    d.PixelRepresentation = int(signed)
    if window: d.WindowCenter,d.WindowWidth = window
    if slope: d.RescaleSlope,d.RescaleIntercept = slope
    d.PixelData = a.tobytes()
    d.save_as(str(fn), enforce_file_format=True)
    return fn

@pytest.mark.parametrize('bits,signed', [(16,False),(14,False),(16,True),(12,True)])
@pytest.mark.parametrize('slope', [None,(2,-100)])
def test_monochrome1_is_turned_whatever_its_bits(tmp_path, bits, signed, slope):
    "GDCM turns it by itself, about the middle of its bits; the window is meant for the values before"
    a = (RAMP//4-(700 if signed else 0)).astype(np.int16 if signed else np.uint16)
    phys = a.astype(np.float32)*(slope or (1,0))[0]+(slope or (1,0))[1]
    two,one = [dicom(tmp_path/f'{p}.dcm', a, p, slope=slope, bits=bits, signed=signed)
            for p in ('MONOCHROME2','MONOCHROME1')]
    assert np.array_equal(load_radiograph(two)[0].numpy(), phys)
    assert np.array_equal(load_radiograph(one)[0].numpy(), phys.max()+phys.min()-phys)
    c,w = float(np.median(phys)),float(np.ptp(phys)/2)
    lin = np.clip((phys-(c-.5))/(w-1)+.5, 0, 1)
    for p,want in (('MONOCHROME2',lin),('MONOCHROME1',1-lin)):
        fn = dicom(tmp_path/f'w{p}.dcm', a, p, window=(c,w), slope=slope, bits=bits, signed=signed)
        assert np.abs(load_radiograph(fn)[0].numpy()-want).max()<1e-4
        assert np.abs(load_radiograph(two if p=='MONOCHROME2' else one, window=(c,w))[0].numpy()-want).max()<1e-4
        assert load_radiograph(fn, window='full').max()>1.5

def test_files_of_many_kinds(tmp_path):
    g = (RAMP>>5).astype(np.uint8)
    at = lambda n: tmp_path/n
    Image.fromarray(RAMP).save(at('a.png'))
    Image.fromarray(RAMP).save(at('a.tif'))
    Image.fromarray(g).save(at('g.png'))
    Image.fromarray(g).save(at('g.tiff'))
    Image.fromarray(RAMP.astype(np.float32)).save(at('f.tif'))
    Image.fromarray(g).save(at('w.tif'), tiffinfo={262:0})
    Image.fromarray(g).quantize(256).save(at('p.png'))
    Image.fromarray(np.stack([g]*3, -1)).save(at('rgb.png'))
    Image.fromarray(np.stack([g,np.full_like(g,255)], -1), 'LA').save(at('la.png'))
    Image.fromarray(np.stack([g]*3+[np.full_like(g,255)], -1), 'RGBA').save(at('rgba.png'))
    Image.fromarray(g).save(at('g.jpg'), quality=100)
    Image.fromarray(np.stack([g]*3, -1)).save(at('c.jpg'), quality=100)
    for n in ('a.png','a.tif','f.tif'):
        assert np.array_equal(load_radiograph(at(n))[0].numpy(), RAMP.astype(np.float32)), n
    for n in ('g.png','g.tiff','rgb.png','la.png','rgba.png','p.png'):
        assert np.array_equal(load_radiograph(at(n))[0].numpy(), g.astype(np.float32)), n
    for n in ('g.jpg','c.jpg'): assert np.abs(load_radiograph(at(n))[0].numpy()-g).max()<3, n
    with Image.open(at('w.tif')) as im: assert np.array_equal(np.asarray(im), g), 'white is zero in it, and PIL knows'
    assert np.array_equal(load_radiograph(at('w.tif'))[0].numpy(), g), 'white is zero in this file'
    x = RadiographPrep(32)(at('a.png'))
    assert len(x.unique())>20, 'sixteen bits are cut'
    ex = Image.fromarray(g)
    e = ex.getexif()
    e[274] = 3
    ex.save(at('turned.jpg'), exif=e, quality=100)
    assert np.abs(load_radiograph(at('turned.jpg'))[0].numpy()-g[::-1,::-1]).max()<3

def test_narrow_range_of_16_bits_keeps_its_steps(tmp_path):
    Image.fromarray((30000+np.arange(64*64)%64).reshape(64,64).astype(np.uint16)).save(tmp_path/'n.png')
    assert len(RadiographPrep(64, normalize='minmax')(tmp_path/'n.png').unique())==64

def test_files_of_0_1_0_say_colour():
    "The argument is `color` now; a model file and an exported Learner of then hold `colour`"
    prep = RadiographPrep(64, color='grey')
    assert RadiographPrep.from_json(prep.to_json().replace('color', 'colour'))==prep
    was,then = RadiographPrep.__new__(RadiographPrep),dict(prep.__dict__)
    was.__setstate__({**{k:v for k,v in then.items() if k!='color'}, 'colour':'grey'})
    assert was==prep and pickle.loads(pickle.dumps(was)).color=='grey'

def test_aspect_is_kept(tmp_path):
    a = np.zeros((60,30), np.uint8)
    a[20:40,5:25] = 200
    Image.fromarray(a).save(tmp_path/'a.png')
    x = RadiographPrep(60, normalize='minmax')(tmp_path/'a.png')[0].numpy()>.5
    assert x.any(1).sum()==x.any(0).sum()==20
    # pixels half as high as they are wide
    pix = load_radiograph(tmp_path/'a.png')
    pix.aspect = .5
    x = RadiographPrep(60, normalize='minmax')(pix)[0].numpy()>.5
    assert abs(x.any(0).sum()-2*x.any(1).sum())<=2

@pytest.fixture(scope='module')
def chests(tmp_path_factory):
    "Twenty-four drawn pictures of twelve patients, in a table and in folders"
    path = tmp_path_factory.mktemp('chests')
    rng,rows = np.random.default_rng(0),[]
    for i in range(24):
        a = rng.normal(100, 10, (40+2*(i%3),40))
        a[(slice(5,15) if i%2 else slice(25,35)),10:30] += 80
        for d in ('all', f"{'train' if i<16 else 'valid'}/{['low','high'][i%2]}"):
            (path/d).mkdir(parents=True, exist_ok=True)
            Image.fromarray(a.clip(0,255).astype(np.uint8)).save(path/d/f'p{i//2:02}_{i}.png')
        rows.append(dict(image=f'all/p{i//2:02}_{i}.png', label=['low','high'][i%2], patient=f'p{i//2:02}', age=30.+i))
    return path,pd.DataFrame(rows)

def test_radiographs_from_df(chests, tmp_path):
    path,df = chests
    dls = RadiographDataLoaders.from_df(df, path, group_col='patient', size=32, bs=4, cache=tmp_path, **QUIET)
    x,y = dls.one_batch()
    assert isinstance(x, TensorRadiograph) and x.shape==(4,1,32,32) and x.dtype==torch.float32 and dls.vocab==['high',
            'low']
    assert not set(dls.train_ds.items.patient)&set(dls.valid_ds.items.patient)
    assert len(list((tmp_path/'picture').iterdir()))==24
    kept = {f:f.stat().st_mtime_ns for f in (tmp_path/'picture').iterdir()}
    d2 = RadiographDataLoaders.from_df(df, path, label_col='age', group_col='patient', size=32, bs=4, cache=tmp_path,
                                       **QUIET)
    assert d2.task=='regression'
    assert kept=={f:f.stat().st_mtime_ns for f in (tmp_path/'picture').iterdir()}, 'decoded twice'
    for d in (dls,): d.show_batch(max_n=2)
    # a file that changed is decoded anew, one that was touched is not
    import os
    (path/df.image[0]).write_bytes((path/df.image[0]).read_bytes()+b'\0')
    os.utime(path/df.image[1], ns=(1,1))
    RadiographDataLoaders.from_df(df, path, group_col='patient', size=32, bs=4, cache=tmp_path, **QUIET)
    assert len(list((tmp_path/'picture').iterdir()))==25

def test_radiographs_from_folder(chests, tmp_path):
    path,df = chests
    dls = RadiographDataLoaders.from_folder(path, size=32, bs=4, cache=tmp_path, groups=lambda f: f.name[:3], **QUIET)
    assert dls.vocab==['high','low'] and (len(dls.train_ds),len(dls.valid_ds))==(16,8) and all(o.startswith('valid')
            for o in dls.valid_ds.items.image)
    d = RadiographDataLoaders.from_folder(path/'train', valid_pct=.25, groups=lambda f: f.name[:3], size=32, bs=4,
                                          cache=tmp_path, **QUIET)
    assert len(d.train_ds)+len(d.valid_ds)==16 and not set(d.train_ds.items.subject)&set(d.valid_ds.items.subject)
    with pytest.raises(MissingFileError, match='test'):
        RadiographDataLoaders.from_folder(path, valid='test', cache=tmp_path, **QUIET)
    with pytest.raises(InputError, match='both sides'):
        RadiographDataLoaders.from_folder(path, size=32, cache=tmp_path, groups=lambda f: 'one', **QUIET)
    with pytest.raises(TypeError, match='sizes'): RadiographDataLoaders.from_folder(path, sizes=3)

def test_augmentation_leaves_validation_alone_and_moves_training(chests, tmp_path):
    path,df = chests
    dls = RadiographDataLoaders.from_df(df, path, size=32, bs=4, cache=tmp_path, **QUIET)
    b = dls.valid.one_batch()
    assert torch.equal(b[0], dls.valid.one_batch()[0])
    raw = torch.stack([dls.valid_ds[i][0] for i in range(len(b[0]))])
    assert torch.equal(raw.as_subclass(Tensor), b[0].as_subclass(Tensor))
    none = RadiographDataLoaders.from_df(df, path, size=32, bs=4, cache=tmp_path, batch_tfms=None, **QUIET)
    flat = {o.numpy().tobytes() for o in (none.train_ds[i][0] for i in range(len(none.train_ds)))}
    assert all(o.numpy().tobytes() in flat for o in none.one_batch()[0]) and not all(o.numpy().tobytes() in flat
            for o in dls.one_batch()[0])

def test_shift_moves_and_repeats_the_edge():
    set_seed(0)
    x = TensorRadiograph(torch.arange(100.).view(1,1,10,10).repeat(50,1,1,1))
    y = ShiftTfm(.2)(x, split_idx=0)
    d = (y-x)[:,0].as_subclass(Tensor)
    mid = d[:,3:7,3:7].flatten(1)
    assert (mid==mid[:,:1]).all() and len(mid[:,0].unique())>10 and mid.abs().max()<=22

def test_workers_change_nothing(chests, tmp_path):
    path,df = chests
    def batches(nw):
        set_seed(1)
        d = RadiographDataLoaders.from_df(df, path, size=32, bs=4, cache=tmp_path, device='cpu', num_workers=nw)
        set_seed(2)
        return [(x.numpy().tobytes(),y.tolist()) for x,y in d.train]
    assert batches(0)==batches(2)

def tiff(fn, a, meaning=1, turned=1):
    "A bare TIFF of 8 bits that says what its values mean and how it lies"
    import struct
    h,w = a.shape
    tags = [(256,w),(257,h),(258,8),(259,1),(262,meaning),(273,8),(274,turned),(277,1),(278,h),(279,a.size)]
    lines = b''.join(struct.pack('<HHII', t, 4, 1, v) for t,v in tags)
    fn.write_bytes(b'II*\0'+struct.pack('<I', 8+a.size)+a.tobytes()+struct.pack('<H', len(tags))+lines+b'\0'*4)
    return fn

def test_negatives_and_mirror_images_are_refused_or_turned(tmp_path):
    "A TIFF where white is zero and a JPEG of printing inks came out as negatives, one that lies on its side mirrored"
    from fastmed.io.volumes import load_volume
    a = (np.add.outer(np.arange(20)*5, np.arange(30)*2)).astype(np.uint8)
    assert np.array_equal(load_radiograph(tiff(tmp_path/'plain.tif', a))[0].numpy(), a)
    assert np.array_equal(load_radiograph(tiff(tmp_path/'half.tif', a, turned=3))[0].numpy(), a[::-1,::-1])
    white = tiff(tmp_path/'white.tif', 255-a, meaning=0)
    assert np.array_equal(load_radiograph(white)[0].numpy(), a)
    assert np.array_equal(load_volume(white)[0,:,:,0].numpy().T, a)
    for turned in (5,6,7,8):
        fn = tiff(tmp_path/'odd.tif', a, turned=turned)
        for load in (load_radiograph, load_volume):
            with pytest.raises(FastmedError, match='on its side'): load(fn)
    Image.fromarray(np.stack([a,a,a,a*0], -1), 'CMYK').save(tmp_path/'inks.jpg')
    with pytest.raises(FastmedError, match='inks'): load_radiograph(tmp_path/'inks.jpg')
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(a).save(tmp_path/'turned.png', exif=exif)
    assert np.array_equal(load_radiograph(tmp_path/'turned.png')[0].numpy(), np.rot90(a, -1))

@pytest.mark.parametrize('values', [[0,1,'0','1'], ['yes','no','yes ','no'], [True,'True',False,'False'],
                                    ['\u00e9','x','e\u0301','x']])
def test_two_spellings_of_a_class_are_refused(values):
    "They were trained as classes of their own"
    df = pd.DataFrame(dict(case=range(16), y=pd.Series(values*4, dtype=object)))
    with pytest.raises(InputError, match='two classes'): label_block(df, 'y')

def test_a_person_on_both_sides_is_told(tmp_path):
    "The column was called patient_id, not subject, and the split parted its patients without a word"
    rows = pd.DataFrame([write_case(tmp_path, f'c{i}', seed=i) for i in range(6)]).assign(patient_id=[1,1,1,2,2,2])
    def made(**kw): return VolumeDataLoaders.from_df(rows, tmp_path, cache=tmp_path/'store', spacing=None, **kw)
    with pytest.warns(UserWarning, match="'patient_id'.*both sides"): made()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        made(group_col='patient_id')

@pytest.mark.parametrize('tag', ['PixelSpacing','ImagerPixelSpacing','PixelAspectRatio'])
def test_pixels_that_are_not_square(tag, tmp_path):
    "Of a DX picture GDCM takes the detector's distances alone, and the picture was squashed"
    pydicom = pytest.importorskip('pydicom')
    fn = dicom(tmp_path/'x.dcm', RAMP, 'MONOCHROME2')
    ds = pydicom.dcmread(fn)
    setattr(ds, tag, [2,1])
    ds.save_as(fn)
    assert load_radiograph(fn).aspect==2
