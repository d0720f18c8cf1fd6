//! The content-addressed store: a thing is built once for each recipe.
//!
//! `ROOT/KIND-HASH/` holds what the recipe made; HASH is SHA-256 over everything that decides the
//! result (tool recipe, package names with versions, other entries' names). An entry is built in
//! a temporary folder beside it and renamed, so that it exists whole or not at all. A lock file
//! keeps two processes from building the same entry.

use crate::error::At;
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Characters of the hash in an entry's name: 80 bits.
const HASH_DIGITS: usize = 20;

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
    /// The person's cache: `$BULKHEAD_CACHE`, or `bulkhead` in `$XDG_CACHE_HOME` or `~/.cache`.
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
            .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("bulkhead")))
            .or_else(|| variable("HOME").map(|home| home.join(".cache/bulkhead")))
            .unwrap_or_else(|| std::env::temp_dir().join("bulkhead-cache"));
        Self::open(root)
    }

    /// A cache in this folder, which is made if need be.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        std::fs::create_dir_all(&root).at("make the folder", &root)?;
        let root = root.canonicalize().at("find", &root)?;
        Ok(Self { root })
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
        let name = recipe.name();
        let entry = self.root.join(&name);
        if entry.exists() {
            return Ok(entry);
        }
        let _lock = self.lock(&name)?;
        if entry.exists() {
            return Ok(entry);
        }
        let temporary = tempfile::Builder::new()
            .prefix(&format!(".{name}."))
            .tempdir_in(&self.root)
            .at("make a folder in", &self.root)?;
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(temporary.path(), mode).at("open up", temporary.path())?;
        build(temporary.path())?;
        std::fs::rename(temporary.path(), &entry).at("put in place", &entry)?;
        // It has moved: there is nothing left to remove under the old name.
        let _ = temporary.keep();
        Ok(entry)
    }

    /// Holds the lock `name` until the file is dropped.
    pub(crate) fn lock(&self, name: &str) -> Result<File> {
        let path = self.root.join(format!(".{name}.lock"));
        let file = File::create(&path).at("make", &path)?;
        file.lock().at("lock", &path)?;
        Ok(file)
    }
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
                std::fs::write(dir.join("f"), b"1").at("write", dir)
            })
            .unwrap();
        assert_eq!(std::fs::read(built.join("f")).unwrap(), b"1");
        let again = cache.entry(recipe(), |_| panic!("built twice")).unwrap();
        assert_eq!(built, again);
    }

    #[test]
    fn ingredients_do_not_run_together() {
        let one = Recipe::new("k", 1).with("ab").with("c").name();
        let other = Recipe::new("k", 1).with("a").with("bc").name();
        assert_ne!(one, other);
    }
}
