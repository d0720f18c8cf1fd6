//! The content-addressed store: a thing is built once for each recipe.
//!
//! `ROOT/KIND-HASH/` holds what the recipe made; HASH is SHA-256 over everything that decides the
//! result (tool recipe, package names with versions, other entries' names). An entry is built in
//! a temporary folder beside it and renamed, so that it exists whole or not at all. A lock file
//! keeps two processes from building the same entry. Where one is built, those of its kind go that
//! nobody has used for long.

use crate::error::At;
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{File, Permissions, TryLockError};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Characters of the hash in an entry's name: 80 bits.
const HASH_DIGITS: usize = 20;
/// Characters behind the name of what is being built.
const RANDOM_LETTERS: usize = 6;
/// As many, behind the name of what is being removed.
const REMOVED: &str = "unused";
/// When the folder of an entry was used last: its modification time. After so long it may go.
const UNUSED_FOR: Duration = Duration::from_secs(60 * 24 * 3600);

/// A folder of built images.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// What decides an entry's content.
#[derive(Debug)]
pub struct Recipe {
    kind: &'static str,
    hash: Sha256,
}

impl Recipe {
    /// A recipe for a kind of entry; `version` changes whenever the code that builds it does.
    #[must_use]
    pub fn new(kind: &'static str, version: u32) -> Self {
        let mut hash = Sha256::new();
        hash.update(version.to_le_bytes());
        Self { kind, hash }
    }

    /// Adds an ingredient.
    #[must_use]
    pub fn with(mut self, ingredient: impl AsRef<[u8]>) -> Self {
        let bytes = ingredient.as_ref();
        self.hash.update((bytes.len() as u64).to_le_bytes());
        self.hash.update(bytes);
        self
    }

    fn name(self) -> String {
        let digest = self.hash.finalize();
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{}", self.kind, &hex[..HASH_DIGITS])
    }
}

impl Cache {
    /// The person's cache: `$BULKHEAD_CACHE`, or `bulkhead` in `$XDG_CACHE_HOME` or `~/.cache`. Nowhere else: a folder in
    /// `/tmp` could be anyone's.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open_default() -> Result<Self> {
        let variable = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let root = variable("BULKHEAD_CACHE")
            // One that is not absolute is no cache (XDG Base Directory Specification).
            .or_else(|| {
                let cache = variable("XDG_CACHE_HOME").filter(|cache| cache.is_absolute())?;
                Some(cache.join("bulkhead"))
            })
            // Where HOME is not set, as the list of users has it.
            .or_else(|| {
                let home = std::env::home_dir().filter(|home| home.is_absolute())?;
                Some(home.join(".cache/bulkhead"))
            });
        Self::open(root.ok_or(Error::NoCache)?)
    }

    /// A cache in this folder, which is made if need be.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        std::fs::create_dir_all(&root).at("make the folder", &root)?;
        let root = root.canonicalize().at("find", &root)?;
        // apt's options and the lists of images are text.
        text(&root)?;
        let cache = Self { root };
        cache.sweep()?;
        Ok(cache)
    }

    /// Removes what builds that were killed have left.
    fn sweep(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.root).at("list", &self.root)?.flatten() {
            let name = entry.file_name();
            let Some(built) = name.to_str().and_then(being_built) else {
                continue;
            };
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            // Whoever builds it holds its lock.
            let lock = self.lock_file(built)?;
            if lock.try_lock().is_ok() {
                // What cannot be removed is in nobody's way.
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        Ok(())
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The entry for `recipe`, built by `build` in an empty folder if it is not there yet.
    ///
    /// # Errors
    /// Whatever `build` returns, or the file system's error.
    pub fn entry(&self, recipe: Recipe, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let kind = recipe.kind;
        let name = recipe.name();
        let entry = self.root.join(&name);
        if used(&entry) {
            return Ok(entry);
        }
        let _lock = self.lock(&name)?;
        if used(&entry) {
            return Ok(entry);
        }
        // Nobody else reaches what is being built, whatever its own permissions must be.
        let temporary = tempfile::Builder::new()
            .prefix(&format!(".{name}."))
            .rand_bytes(RANDOM_LETTERS)
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(&self.root)
            .at("make a folder in", &self.root)?;
        build(temporary.path())?;
        let mode = Permissions::from_mode(0o755);
        std::fs::set_permissions(temporary.path(), mode).at("open up", temporary.path())?;
        // After a crash of the machine, too, what has its name is whole.
        let folder = File::open(temporary.path()).at("open", temporary.path())?;
        nix::unistd::syncfs(&folder)
            .map_err(std::io::Error::from)
            .at("sync", temporary.path())?;
        std::fs::rename(temporary.path(), &entry).at("put in place", &entry)?;
        // It has moved: there is nothing left to remove under the old name.
        let _ = temporary.keep();
        self.expire(kind);
        Ok(entry)
    }

    /// Removes what nobody has used for long of a kind of which there is a new one. What cannot be removed stays.
    fn expire(&self, kind: &str) {
        for entry in std::fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| kind_of(name) == Some(kind)) else {
                continue;
            };
            let old = |entry: &std::fs::DirEntry| {
                let about = entry.metadata().ok().filter(std::fs::Metadata::is_dir)?;
                let unused = SystemTime::now().duration_since(about.modified().ok()?).ok()?;
                (unused > UNUSED_FOR).then_some(())
            };
            let Ok(lock) = self.lock_file(name) else { continue };
            if lock.try_lock().is_ok() && old(&entry).is_some() {
                // Whole or not at all, here too.
                let removed = self.root.join(format!(".{name}.{REMOVED}"));
                let _ =
                    std::fs::rename(entry.path(), &removed).and_then(|()| std::fs::remove_dir_all(&removed));
            }
        }
    }

    /// Holds the lock `name` until the file is dropped.
    pub(crate) fn lock(&self, name: &str) -> Result<File> {
        let file = self.lock_file(name)?;
        let busy = || eprintln!("images: waiting for another process that makes {name}");
        lock(&file, busy).at("lock", self.root.join(name))?;
        Ok(file)
    }

    fn lock_file(&self, name: &str) -> Result<File> {
        let path = self.root.join(format!(".{name}.lock"));
        File::create(&path).at("make", &path)
    }
}

/// Locks a file until it is dropped; where another has the lock, calls `busy` first, since that may take minutes.
///
/// # Errors
/// The system's.
pub fn lock(file: &File, busy: impl FnOnce()) -> std::io::Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            busy();
            file.lock()
        }
        Err(TryLockError::Error(error)) => Err(error),
        Ok(()) => Ok(()),
    }
}

/// The entry that is built in a folder of this name: `.KIND-HASH.RANDOM`. Nothing else is ours, as the folder may be a
/// person's own.
fn being_built(name: &str) -> Option<&str> {
    let (entry, random) = name.strip_prefix('.')?.rsplit_once('.')?;
    let ours = kind_of(entry).is_some()
        && random.len() == RANDOM_LETTERS
        && random.bytes().all(|letter| letter.is_ascii_alphanumeric());
    ours.then_some(entry)
}

/// The kind of the entry of this name.
fn kind_of(entry: &str) -> Option<&str> {
    let (kind, hash) = entry.rsplit_once('-')?;
    let ours = !kind.is_empty()
        && hash.len() == HASH_DIGITS
        && hash
            .bytes()
            .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    ours.then_some(kind)
}

/// Whether there is an entry, whose use is noted; in somebody else's cache it cannot be.
fn used(entry: &Path) -> bool {
    let folder = File::open(entry);
    folder
        .map(|folder| folder.set_modified(SystemTime::now()))
        .is_ok()
}

/// A path as the text that tools take.
pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::Format {
        path: path.to_owned(),
        what: "the name is not UTF-8".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_built_once_and_a_failed_one_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let recipe = || Recipe::new("thing", 1).with("a").with("b");
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        let failed = cache.entry(recipe(), |_| Err(Error::NoPackage("x".into())));
        assert!(failed.is_err());
        let visible = |entry: &std::fs::DirEntry| !entry.file_name().to_string_lossy().ends_with(".lock");
        let left = std::fs::read_dir(cache.root())
            .unwrap()
            .filter(|e| visible(e.as_ref().unwrap()))
            .count();
        assert_eq!(left, 0);
        let built = cache
            .entry(recipe(), |dir| {
                assert_eq!(mode(dir), 0o700);
                std::fs::write(dir.join("f"), b"1").at("write", dir)
            })
            .unwrap();
        assert_eq!(std::fs::read(built.join("f")).unwrap(), b"1");
        assert_eq!(mode(&built), 0o755);
        let again = cache.entry(recipe(), |_| panic!("built twice")).unwrap();
        assert_eq!(built, again);
    }

    #[test]
    fn what_killed_builds_left_goes_and_what_is_being_built_stays() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let left = folder.path().join(".thing-0123456789abcdef0123.aBcDe1");
        std::fs::create_dir(&left).unwrap();
        std::fs::write(left.join("half"), b"1").unwrap();
        let recipe = Recipe::new("thing", 1).with("a");
        let built = cache.entry(recipe, |temporary| {
            Cache::open(folder.path())?;
            assert!(temporary.exists());
            Ok(())
        });
        assert!(built.unwrap().exists() && !left.exists());
    }

    #[test]
    fn what_else_is_in_the_folder_is_nobody_s_to_remove() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in [
            ".emacs.d",
            ".bashrc.d",
            ".x-0123456789abcdef0123.d",
            ".x-0123.abcdef",
        ] {
            std::fs::create_dir(path(name)).unwrap();
            std::fs::write(path(name).join("init.el"), b"1").unwrap();
        }
        std::os::unix::fs::symlink(path(".emacs.d"), path(".x-0123456789abcdef0123.abcdef")).unwrap();
        let names = || -> Vec<_> {
            let all = std::fs::read_dir(folder.path()).unwrap();
            let mut all: Vec<_> = all.map(|entry| entry.unwrap().file_name()).collect();
            all.sort();
            all
        };
        let before = names();
        Cache::open(folder.path()).unwrap();
        assert_eq!(names(), before);
        assert!(path(".emacs.d/init.el").exists());
    }

    #[test]
    fn what_nobody_used_for_long_goes_with_the_next_of_its_kind() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let build = |kind, name: &str| {
            let recipe = Recipe::new(kind, 1).with(name);
            let built = cache.entry(recipe, |dir| {
                std::fs::create_dir(dir.join("full")).at("make", dir)
            });
            built.unwrap()
        };
        let age = |path: &Path| {
            let long_ago = SystemTime::now() - UNUSED_FOR - Duration::from_secs(60);
            File::open(path).unwrap().set_modified(long_ago).unwrap();
        };
        let own = folder.path().join("thing-notes");
        std::fs::create_dir(&own).unwrap();
        let [old, used, held, fresh] = ["old", "used", "held", "fresh"].map(|name| build("thing", name));
        let other = build("other", "old");
        for path in [&own, &old, &used, &held, &other] {
            age(path);
        }
        build("thing", "used");
        let name = held.file_name().unwrap().to_str().unwrap();
        let lock = cache.lock(name).unwrap();
        build("thing", "new");
        drop(lock);
        assert!(!old.exists());
        for path in [&own, &used, &held, &fresh, &other] {
            assert!(path.exists(), "{}", path.display());
        }
    }

    #[test]
    fn whoever_waits_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let first = cache.lock_file("x").unwrap();
        lock(&first, || panic!("nobody has it")).unwrap();
        let second = cache.lock_file("x").unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| lock(&second, || tell.send(()).unwrap()));
            let said = told.recv_timeout(std::time::Duration::from_secs(10));
            first.unlock().unwrap();
            waits.join().unwrap().unwrap();
            assert!(said.is_ok() && first.try_lock().is_err());
        });
    }

    #[test]
    fn a_cache_that_is_no_text_is_refused_at_once() {
        use std::os::unix::ffi::OsStrExt;
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join(std::ffi::OsStr::from_bytes(b"a\xff"));
        assert!(matches!(Cache::open(root), Err(Error::Format { .. })));
    }

    #[test]
    fn ingredients_do_not_run_together() {
        let one = Recipe::new("k", 1).with("ab").with("c").name();
        let other = Recipe::new("k", 1).with("a").with("bc").name();
        assert_ne!(one, other);
    }
}
