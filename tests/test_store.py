"A store serves the content that a file has now, whatever its times and size say, and reads nothing twice."
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from phantoms import CODES, write_case

import fastmed.data.store
from fastmed.core import FileError, TensorVolume
from fastmed.data.loaders import VolumeDataLoaders
from fastmed.data.preprocess import Preprocess
from fastmed.data.store import Store, kept_digest
from fastmed.io.formats import file_digest
from fastmed.io.volumes import load_volume, save_volume
from fastmed.learn.learner import unet3d_learner


def same_size(fn, value, at=slice(None), packed=False):
    """Write a scan again with other voxels, the same size and the same time; of a packed one, whose size may differ,
    the same time"""
    st,im = os.stat(fn),nib.load(fn)
    a = np.asarray(im.dataobj).copy()
    a.reshape(-1)[at] = value
    nib.save(nib.Nifti1Image(a, im.affine, im.header), fn)
    os.utime(fn, ns=(st.st_atime_ns, st.st_mtime_ns))
    assert packed or (os.stat(fn).st_size,os.stat(fn).st_mtime_ns)==(st.st_size,st.st_mtime_ns)

def volume(fn, value=1., shape=(48,48,48)):
    a = np.full(shape, value, np.float32)
    a[0,0,0] = 0
    return str(save_volume(TensorVolume(a[None], affine=np.eye(4)), fn))

@pytest.fixture
def store(tmp_path): return lambda: Store(Preprocess(normalize='none'), tmp_path/'store')

def middle(store, fn): return store.image(fn)[0,24,24,24].item()

@pytest.fixture
def settled(monkeypatch):
    "As if every file had been written long ago, so that records of digests are kept and used"
    now = fastmed.data.store.time.time_ns
    class Later:
        def time_ns(): return now()+10**10
    monkeypatch.setattr(fastmed.data.store, 'time', Later)

@pytest.mark.parametrize('at', [slice(None), slice(50_000, 60_000)])
def test_rewritten_with_same_size_and_time(tmp_path, store, settled, at):
    "All of it, or a part that lies far from head, middle and tail"
    fn = volume(tmp_path/'a.nii')
    s = store().build([fn])
    assert middle(s, fn)==1
    at = at if at!=slice(None) else slice(100, None)
    same_size(fn, 7., at)
    want = load_volume(fn).numpy()
    assert np.array_equal(store().build([fn]).image(fn).numpy(), want)
    assert np.array_equal(s.image(fn).numpy(), want), 'a store that is open gives the old content'

def test_packed_scan_rewritten(tmp_path, store, settled):
    fn = volume(tmp_path/'a.nii.gz', 3.)
    st = os.stat(fn)
    store().build([fn])
    volume(fn, 5.)
    os.utime(fn, ns=(st.st_atime_ns, st.st_mtime_ns))
    assert middle(store().build([fn]), fn)==5

def test_training_sees_the_new_content(tmp_path, settled):
    "Images and masks of `from_df`, and the statistics fitted on them"
    df = pd.DataFrame([write_case(tmp_path, f'c{i}', seed=i) for i in range(4)])
    kwargs = dict(codes=CODES, valid_pct=.25, patch=16, bs=2, num_workers=0, device='cpu', cache=tmp_path/'store',
                  spacing=None, normalize='ct')
    def loaders(): return VolumeDataLoaders.from_df(df, tmp_path, **kwargs)
    was = loaders().preprocess.to_dict()
    for f in df.image: same_size(tmp_path/f, 900., slice(0, 4000))
    for f in df['mask']: same_size(tmp_path/f, 2, slice(0, 4000))
    pre = loaders().preprocess
    s = Store(pre, tmp_path/'store')
    assert pre.to_dict()!=was
    for im,m in zip(df.image, df['mask']):
        assert (s.mask(str(tmp_path/m)).numpy().reshape(-1)[:4000]==2).all()
        assert np.array_equal(s.image(str(tmp_path/im)).numpy(), pre(load_volume(tmp_path/im)).numpy())

def test_a_folder_is_predicted_anew(loaders, study, tmp_path):
    "Where a scan was written again with the size and time of the old one"
    path,df = study
    learn = unet3d_learner(loaders[3], nf=4, depth=2)
    (tmp_path/'in').mkdir()
    fn = tmp_path/'in/a.nii.gz'
    nib.save(nib.load(path/df.image[0]), fn)
    same_size(fn, 5., slice(100, None), packed=True)
    learn.predict_folder(tmp_path/'in', tmp_path/'out')
    first = file_digest(tmp_path/'out/a.nii.gz')
    stamp = (tmp_path/'out/a.nii.gz').stat().st_mtime_ns
    learn.predict_folder(tmp_path/'in', tmp_path/'out')
    assert (tmp_path/'out/a.nii.gz').stat().st_mtime_ns==stamp
    same_size(fn, 6., slice(100, None), packed=True)
    learn.predict_folder(tmp_path/'in', tmp_path/'out')
    assert file_digest(tmp_path/'out/a.nii.gz')!=first

def test_truncated_then_whole_again(tmp_path, store, settled):
    fn = volume(tmp_path/'a.nii')
    b = open(fn, 'rb').read()
    st = os.stat(fn)
    store().build([fn])
    open(fn, 'wb').write(b[:len(b)//2])
    os.utime(fn, ns=(st.st_atime_ns, st.st_mtime_ns))
    with pytest.raises(FileError, match='a.nii'): store().build([fn])
    open(fn, 'wb').write(b)
    assert middle(store().build([fn]), fn)==1

def test_time_that_goes_back(tmp_path, store, settled):
    fn = volume(tmp_path/'a.nii')
    store().build([fn])
    volume(fn, 4.)
    os.utime(fn, ns=(1, 1))
    assert middle(store().build([fn]), fn)==4
    volume(fn, 1.)
    os.utime(fn, ns=(1, 1))
    assert middle(store().build([fn]), fn)==1

def test_copies_and_hard_links_share_an_entry(tmp_path, store, settled):
    "Under names of their own; written through one name, the other gives the new content too"
    fn = volume(tmp_path/'a.nii', 2.)
    s = store().build([fn])
    copy,link = str(shutil.copy(fn, tmp_path/'b.nii')),str(tmp_path/'c.nii')
    os.link(fn, link)
    assert s.entry('image', fn)==s.entry('image', copy)==s.entry('image', link) and [s.image(o).meta['fn']
            for o in (copy, link)]==[copy, link]
    same_size(link, 8., slice(100, None))
    assert middle(s.build([fn]), fn)==8 and middle(s, link)==8 and middle(s, copy)==2

def test_two_scans_alike_at_both_ends_are_two(tmp_path, store, settled):
    "Masks of one size with zeros at head, middle and tail"
    a,b = volume(tmp_path/'a.nii', 0, (96,96,96)),volume(tmp_path/'b.nii', 0, (96,96,96))
    same_size(b, 1, slice(200_000, 300_000))
    s = store().build([a, b])
    assert s.entry('image', a)!=s.entry('image', b) and s.image(a).sum()==0 and s.image(b).sum()==100_000

def test_voxels_that_lie_beside_their_header(tmp_path, store, settled):
    "The .img of a .hdr, the .raw of a .mhd"
    sitk = pytest.importorskip('SimpleITK')
    for _k,(fn,side) in enumerate((('a.hdr','a.img'), ('b.mhd','b.raw'))):
        a = np.full((40,40,40), 1, np.float32)
        fn,side = str(tmp_path/fn),tmp_path/side
        if fn.endswith('.mhd'): sitk.WriteImage(sitk.GetImageFromArray(a), fn)
        else: nib.save(nib.Nifti1Pair(a, np.eye(4)), fn)
        s = store().build([fn])
        assert s.image(fn).mean()==1
        st = side.stat()
        side.write_bytes(np.full((40,40,40), 6, np.float32).tobytes())
        os.utime(side, ns=(st.st_atime_ns, st.st_mtime_ns))
        assert store().build([fn]).image(fn).mean()==6, fn

def test_second_start_reads_no_scan(tmp_path, store, settled, monkeypatch):
    "Only stat calls and small records, also after a change of inode and times alone"
    fns = [volume(tmp_path/f'{i}.nii', i) for i in range(5)]
    store().build(fns)
    asked = []
    def ask(fn):
        if 'store' not in Path(fn).parts: asked.append(fn)          # the entries are: see test_shared_machine
        return file_digest(fn)
    monkeypatch.setattr(fastmed.data.store, 'file_digest', ask)
    store().build(fns)
    assert not asked
    shutil.copy2(fns[2], tmp_path/'x')
    os.replace(tmp_path/'x', fns[2])
    monkeypatch.setattr(Preprocess, '__call__', lambda *a: pytest.fail('made again'))
    store().build(fns)
    assert set(asked)=={fns[2]}

def test_written_twice_within_a_tick(tmp_path, store):
    "No record is kept of what was written a moment ago"
    fn = volume(tmp_path/'a.nii')
    kept_digest(fn, tmp_path/'store')
    assert not list((tmp_path/'store').glob('facts/*'))

def test_written_to_while_it_is_read(tmp_path, store):
    "What was read then belongs to no content, and is not kept"
    fn = volume(tmp_path/'a.nii')
    s = store()
    pre = s.preprocess
    class Slow(Preprocess):
        def __call__(self, t):
            volume(fn, 9.)
            return pre(t)
    s.preprocess = Slow(normalize='none')
    with pytest.raises(FileError, match='while it was read'): s.build([fn])
    assert not [o for o in (tmp_path/'store/image').glob('*') if not o.name.startswith('.')]

@pytest.mark.parametrize('mode', (False, True))
def test_writing_into_a_read_scan_reaches_no_later_read(mode, store, tmp_path):
    "`x += 1` stayed in the map that the next read was given"
    import torch
    fn = volume(tmp_path/'a.nii', 5.)
    s = store().build([fn])
    with torch.inference_mode(mode):
        x = s.image(fn)
        x += 1
        assert middle(s, fn)==5. and x[0,24,24,24]==6.
        z = s.image(fn)
        assert s.image(fn).data_ptr()==z.data_ptr(), 'still mapped once'

def test_the_order_of_codes_numbers_the_classes(tmp_path):
    "Two orders of one dict shared an entry of the store: id 1, named after one structure, held the voxels of another"
    rows = pd.DataFrame([write_case(tmp_path, f'c{i}', seed=i) for i in range(4)])
    sizes = {}
    for seed,codes in ((1, dict(background=0, large=1, small=2)), (2, dict(background=0, small=2, large=1))):
        dls = VolumeDataLoaders.from_df(rows, tmp_path, codes=codes, seed=seed, spacing=None, cache=tmp_path/'store')
        assert dls.codes==list(codes)
        mask = dls.train_ds.tls[1].tfms.fs[-1].encodes(str(tmp_path/rows['mask'][0]))
        sizes[seed] = {name:int((mask==k).sum()) for k,name in enumerate(mask.codes)}
    assert sizes[1]==sizes[2] and sizes[1]['large']!=sizes[1]['small']
    again = [VolumeDataLoaders.from_df(rows, tmp_path, codes=codes, seed=1, spacing=None, cache=tmp_path/'store').codes
             for codes in (dict(background=0, large=1, small=2), dict(background=0, small=2, large=1))]
    assert again==[['background','large','small'], ['background','small','large']]

def test_two_that_find_the_same_at_once(store, tmp_path, monkeypatch):
    "Masks of one content, such as empty ones, are read by threads: the fact that one wrote was replaced by the other"
    replace = os.replace
    def twice(src, dst):
        replace(src, dst)
        other = Path(dst).with_name('other')
        other.write_text(Path(dst).read_text())
        replace(other, dst)
    monkeypatch.setattr(os, 'replace', twice)
    assert store().cached('fact', 'key', lambda: [0,1])==[0,1]
    monkeypatch.undo()
    assert store().cached('fact', 'key', lambda: 'anew')==[0,1]
