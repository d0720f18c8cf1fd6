//! Folders that are removed: a test's in memory, and a command's in `/var/tmp`, which goes with the command; what killed ones have left goes with the next.

use crate::interrupt::{self, Guard};
use std::fs::{self, DirEntry, File};
use std::io::Result;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

/// A new folder, in memory where that is possible: for tests to which a flush that waits for a busy host's disk says
/// nothing.
///
/// # Errors
/// The file system's.
pub fn quick_folder() -> Result<TempDir> {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    }
}

/// On a disk, whatever `/tmp` is, and for the users that a command becomes.
const PLACE: &str = "/var/tmp";
/// A folder that nobody has locked is only left behind once it is as old: at first its maker has not locked it yet.
const LEFT_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The folder.
#[derive(Debug)]
pub struct Scratch {
    // Removed while it is still locked.
    folder: TempDir,
    _guard: Guard,
    _lock: File,
}

impl Scratch {
    /// Makes `bulkhead-KIND-RANDOM`, for its owner alone, and removes others of its kind that nobody has any more.
    ///
    /// # Errors
    /// The file system's.
    pub fn make(kind: &str) -> Result<Self> {
        Self::make_in(Path::new(PLACE), kind)
    }

    fn make_in(place: &Path, kind: &str) -> Result<Self> {
        let prefix = format!("bulkhead-{kind}-");
        for entry in fs::read_dir(place)?.flatten() {
            if entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(prefix.as_bytes())
                && is_left(&entry)
            {
                // What cannot be removed is in nobody's way.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let folder = tempfile::Builder::new().prefix(&prefix).tempdir_in(place)?;
        let lock = File::open(folder.path())?;
        lock.lock()?;
        Ok(Self {
            _guard: interrupt::folder(folder.path()),
            folder,
            _lock: lock,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// A folder of this user's, old and unlocked.
fn is_left(entry: &DirEntry) -> bool {
    let Ok(about) = entry.metadata() else { return false };
    let ours = about.is_dir() && about.uid() == nix::unistd::geteuid().as_raw();
    let age = about
        .modified()
        .ok()
        .and_then(|made| SystemTime::now().duration_since(made).ok());
    ours && age.is_some_and(|age| age > LEFT_AFTER)
        && File::open(entry.path()).is_ok_and(|folder| folder.try_lock().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_command_left_goes_and_what_is_in_use_stays() {
        let place = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = place.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("file"), "").unwrap();
            path
        };
        let age = |path: &Path| {
            let long_ago = SystemTime::now() - LEFT_AFTER - Duration::from_secs(60);
            File::open(path).unwrap().set_modified(long_ago).unwrap();
        };
        let [left, other, fresh] = ["bulkhead-x-left", "bulkhead-y-left", "bulkhead-x-fresh"].map(make);
        let used = Scratch::make_in(place.path(), "x").unwrap();
        for path in [&left, &other, used.path()] {
            age(path);
        }
        let next = Scratch::make_in(place.path(), "x").unwrap();
        assert!(!left.exists());
        for path in [&other, &fresh, used.path(), next.path()] {
            assert!(path.exists(), "{}", path.display());
        }
        let gone = next.path().to_owned();
        drop(next);
        assert!(!gone.exists());
    }
}
