//! A new image's file: it has its name once it is done, so that nobody takes half of one for a whole, however the
//! making ends.

use crate::failure::Failure;
use crate::launch::inputs::unopened;
use crate::launch::signals::{LEAVING, take_by_descriptor};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::signalfd::SignalFd;
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

pub(super) struct NewFile {
    path: PathBuf,
    file: File,
    /// The folder that it gets this name in; `None` where the file system has no files without one.
    unnamed: Option<(File, OsString)>,
    /// [`LEAVING`].
    pub(super) signals: SignalFd,
}

impl NewFile {
    /// An empty one. From here on the signals that end us are for whoever reads them.
    pub(super) fn make(path: &Path) -> Result<Self, Failure> {
        let signals =
            take_by_descriptor(LEAVING).map_err(|e| Failure::host("cannot take signals").because(&e))?;
        let (file, unnamed) = open(path).map_err(|e| unmade(path, &e))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            unnamed,
            signals,
        })
    }

    pub(super) fn handle(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Gives it its name if it was made well; else nothing of it stays.
    pub(super) fn conclude(&self, made: Result<(), Failure>) -> Result<(), Failure> {
        match &self.unnamed {
            Some((folder, name)) => {
                made?;
                let link = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                linkat(
                    AT_FDCWD,
                    link.as_str(),
                    folder,
                    name.as_os_str(),
                    AtFlags::AT_SYMLINK_FOLLOW,
                )
                .map_err(|e| unmade(&self.path, &e.into()))?;
                // Its name is to last as what is in it does.
                self.file.sync_all().map_err(|e| {
                    // As below.
                    let _ = unlinkat(folder, name.as_os_str(), UnlinkatFlags::NoRemoveDir);
                    unmade(&self.path, &e)
                })
            }
            None => made.inspect_err(|_| {
                // What cannot be removed stays; the failure that led here is what the person is told.
                let _ = fs::remove_file(&self.path);
            }),
        }
    }
}

fn open(path: &Path) -> io::Result<(File, Option<(File, OsString)>)> {
    // It is refused in the end too; the work is not done first.
    match fs::symlink_metadata(path) {
        Ok(_) => return Err(Errno::EEXIST.into()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let whole = |name: &&std::ffi::OsStr| path.as_os_str().as_bytes().ends_with(name.as_bytes());
    let name = path.file_name().filter(whole).ok_or(Errno::EISDIR)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(folder.unwrap_or(Path::new(".")))?;
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    match openat(&folder, c".", flags, Mode::from_bits_truncate(0o666)) {
        Ok(file) => Ok((file.into(), Some((folder, name.to_owned())))),
        Err(Errno::EOPNOTSUPP | Errno::EISDIR) => {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).open(path)?;
            Ok((file, None))
        }
        Err(e) => Err(e.into()),
    }
}

fn unmade(path: &Path, error: &io::Error) -> Failure {
    let failure = Failure::host(format!("image: cannot make {}", path.display()));
    match error.kind() {
        io::ErrorKind::AlreadyExists => failure.because(error).hint(taken(path)),
        _ => unopened(failure, path, error),
    }
}

/// What helps where something has the name of a new file.
fn taken(path: &Path) -> &'static str {
    match fs::metadata(path) {
        Ok(there) if !there.is_file() => {
            "only new files are made: qemu-img convert -n writes to a device, and dd copies a file to one"
        }
        _ => "a file that is there is never overwritten: remove it first, or take another name",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    fn text(result: Result<NewFile, Failure>) -> String {
        result
            .err()
            .map(|failure| failure.to_string())
            .unwrap_or_default()
    }

    #[test]
    fn a_name_is_for_what_was_made_well() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let failed = || Err(Failure::host("no"));
        let new = NewFile::make(&path).unwrap();
        assert!(!path.exists() || new.unnamed.is_none());
        assert!(new.conclude(failed()).is_err() && !path.exists());
        let new = NewFile::make(&path).unwrap();
        new.handle().unwrap().write_all(b"x").unwrap();
        new.conclude(Ok(())).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"x");
        // Where there are no files without a name.
        let other = folder.path().join("b");
        let new = NewFile {
            path: other.clone(),
            file: File::create_new(&other).unwrap(),
            unnamed: None,
            signals: take_by_descriptor([]).unwrap(),
        };
        assert!(new.conclude(failed()).is_err() && !other.exists());
    }

    #[test]
    fn what_is_there_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let new = NewFile::make(&path).unwrap();
        if new.unnamed.is_some() {
            fs::write(&path, "theirs").unwrap();
            let failure = new.conclude(Ok(())).unwrap_err().to_string();
            assert!(failure.contains("never overwritten"), "{failure}");
            assert_eq!(fs::read(&path).unwrap(), b"theirs");
        }
        symlink("nowhere", folder.path().join("link")).unwrap();
        for (name, words) in [
            ("a", "never overwritten"),
            ("link", "never overwritten"),
            ("b/", "Is a directory"),
            ("b/.", "Is a directory"),
            ("no/b", "No such file"),
            ("a/b", "Not a directory"),
        ] {
            let failure = text(NewFile::make(&folder.path().join(name)));
            assert!(failure.contains(words), "{name}: {failure}");
        }
    }

    #[test]
    fn nobody_is_told_to_remove_a_device() {
        assert!(taken(Path::new("/dev/null")).contains("convert -n"));
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(taken(file.path()).contains("remove it"));
    }
}
