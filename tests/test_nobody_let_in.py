"What somebody else plants, sends or asks at the same time: nothing of theirs is written to, run or waited for."
import os
import stat

import pytest

from fastmed.core import beside, sweep, whole_file, whole_folder


def names(path): return sorted(o.name for o in path.iterdir())

def next_name(fn, folder=False):
    "The name that the next temporary of `fn` would get"
    with beside(fn, folder) as tmp: return tmp

@pytest.mark.skipif(not hasattr(os, 'geteuid'), reason='links and owners of POSIX')
class TestTemporaryFiles:
    @pytest.mark.parametrize('plant', ['symlink','hard link','dangling link','pipe'])
    def test_a_planted_link_is_not_written_through(self, tmp_path, plant):
        (tmp_path/'theirs').mkdir()
        theirs = tmp_path/'theirs/diary'
        theirs.write_text('diary')
        d = tmp_path/'d'
        d.mkdir()
        fn = d/'table.csv'
        tmp = next_name(fn)
        if plant=='symlink': tmp.symlink_to(theirs)
        if plant=='hard link': os.link(theirs, tmp)
        if plant=='dangling link': tmp.symlink_to(tmp_path/'theirs/new')
        if plant=='pipe': os.mkfifo(tmp)
        with whole_file(fn) as t: t.write_text('ours')
        sweep(d)
        assert theirs.read_text()=='diary' and fn.read_text()=='ours' and names(tmp_path/'theirs')==['diary'] and names(
                d)==sorted([tmp.name, 'table.csv'])

    def test_a_planted_link_to_a_folder_is_not_emptied(self, tmp_path):
        theirs,d = tmp_path/'theirs',tmp_path/'d'
        theirs.mkdir()
        d.mkdir()
        (theirs/'diary').write_text('diary')
        fn = d/'entry'
        tmp = next_name(fn, True)
        tmp.symlink_to(theirs, target_is_directory=True)
        with whole_folder(fn) as t: (t/'a').write_text('ours')
        sweep(d)
        assert names(theirs)==['diary'] and names(fn)==['a']
        tmp.unlink()
        tmp.mkdir()
        (tmp/'link').symlink_to(theirs, target_is_directory=True)
        (tmp/'sub').mkdir()
        (tmp/'sub'/'link').symlink_to(theirs/'diary')
        with whole_folder(d/'entry 2') as t: pass
        # what a killed process left is taken over, its links with it
        with beside(fn, True) as t:
            assert t==tmp and not names(t)
        assert names(theirs)==['diary'] and (theirs/'diary').read_text()=='diary'

    def test_sweep_leaves_what_belongs_to_another_user(self, tmp_path):
        if os.geteuid(): pytest.skip('only root may give files away')
        fn = tmp_path/'table.csv'
        tmp = next_name(fn)
        tmp.write_text('theirs')
        os.chown(tmp, 12345, 12345)
        box = next_name(tmp_path/'entry', True)
        box.mkdir()
        (box/'a').write_text('theirs')
        os.chown(box, 12345, 12345)
        with whole_file(fn) as t: t.write_text('ours')
        with whole_folder(tmp_path/'entry') as t: (t/'b').write_text('ours')
        sweep(tmp_path)
        assert tmp.read_text()==(box/'a').read_text()=='theirs' and fn.read_text()=='ours' and names(tmp_path
                /'entry')==['b']

    def test_one_alone_is_not_kept_waiting_by_a_planted_name(self, tmp_path):
        fn = tmp_path/'run'
        next_name(fn, True).symlink_to(tmp_path)
        with beside(fn, True, alone=True) as a, beside(fn, True, alone=True) as b: assert a is not None and b is None

    def test_permissions_are_those_of_any_new_file(self, tmp_path):
        (tmp_path/'plain').write_text('')
        with whole_file(tmp_path/'whole') as t: t.write_text('')
        assert stat.S_IMODE((tmp_path/'whole').stat().st_mode)==stat.S_IMODE((tmp_path/'plain').stat().st_mode)
