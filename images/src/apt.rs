//! Debian packages without root: apt with a state folder of its own.

use crate::cache::{Cache, Recipe, text};
use crate::command::run;
use crate::error::At;
use crate::progress::Step;
use crate::sources::{self, Backports};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

/// Package lists older than this are fetched again.
const LISTS_FRESH_FOR: Duration = Duration::from_secs(7 * 24 * 3600);

/// The release whose own kernel is older than the one that guests boot.
pub(crate) const KERNEL_FROM_BACKPORTS: &str = "bookworm";

/// apt, pointed at the sources of the machine's release, plus its backports where the kernel comes
/// from there.
#[derive(Debug)]
pub struct Apt {
    cache: Cache,
    folder: PathBuf,
    codename: String,
}

/// A package in one version.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Package {
    /// The package's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Packages that it depends on, names only, in the order of the Depends field.
    pub depends: Vec<String>,
}

impl Apt {
    /// Prepares apt; fetches the package lists if there are none or they are old. Lists that
    /// cannot be renewed are used as they are.
    ///
    /// # Errors
    /// No Debian source, no lists and no network, or no apt.
    pub fn open(cache: &Cache) -> Result<Self> {
        let codename = codename(Path::new("/etc/os-release"))?;
        let machine = sources::machine_sources(Path::new("/etc/apt"));
        let backports = if codename == KERNEL_FROM_BACKPORTS {
            Backports::Added
        } else {
            Backports::LeftOut
        };
        let list = sources::for_release(&machine, &codename, backports)
            .ok_or_else(|| Error::NoSource(codename.clone()))?;
        let folder = cache.root().join("apt").join(&codename);
        Self::of(cache, folder, codename, &list)
    }

    fn of(cache: &Cache, folder: PathBuf, codename: String, list: &str) -> Result<Self> {
        for part in ["state/lists/partial", "cache/archives/partial", "empty"] {
            let path = folder.join(part);
            std::fs::create_dir_all(&path).at("make the folder", path)?;
        }
        let apt = Self {
            cache: cache.clone(),
            folder,
            codename,
        };
        let _lock = cache.lock("apt")?;
        apt.renew(list)?;
        Ok(apt)
    }

    /// The release's code name, such as `bookworm`.
    #[must_use]
    pub fn codename(&self) -> &str {
        &self.codename
    }

    /// The sources that this uses, one deb822 file; for tools that bootstrap a system.
    #[must_use]
    pub fn sources_file(&self) -> PathBuf {
        self.folder.join("bulkhead.sources")
    }

    /// The newest version of a package, in `suite` if given.
    ///
    /// # Errors
    /// [`Error::NoPackage`] if there is none.
    pub fn find(&self, name: &str, suite: Option<&str>) -> Result<Package> {
        let wanted = suite.map_or_else(|| name.to_owned(), |suite| format!("{name}/{suite}"));
        let shown = run(
            self.tool("apt-cache")
                .args(["show", "--no-all-versions", &wanted]),
            "apt",
        );
        let shown = shown.map_err(|_| Error::NoPackage(wanted.clone()))?;
        let shown = String::from_utf8_lossy(&shown);
        parse_show(&shown).ok_or(Error::NoPackage(wanted))
    }

    /// The package's files, unpacked.
    ///
    /// # Errors
    /// The package cannot be fetched or unpacked.
    pub fn unpacked(&self, package: &Package) -> Result<PathBuf> {
        let recipe = Recipe::new("package", 1)
            .with(&package.name)
            .with(&package.version);
        self.cache.entry(recipe, |folder| {
            let step = Step::start(&format!("fetch {} {}", package.name, package.version));
            let download = folder.join("download");
            std::fs::create_dir(&download).at("make the folder", &download)?;
            let exact = format!("{}={}", package.name, package.version);
            self.download(&exact, &download)?;
            step.now(&format!("unpack {} {}", package.name, package.version));
            let archive = only_file(&download)?;
            run(
                Command::new("dpkg-deb").arg("-x").arg(&archive).arg(folder),
                "dpkg",
            )?;
            std::fs::remove_dir_all(&download).at("remove", &download)
        })
    }

    fn download(&self, exact: &str, folder: &Path) -> Result<()> {
        let mut download = self.tool("apt-get");
        download.args(["download", exact]).current_dir(folder);
        match run(&mut download, "apt") {
            Err(Error::Command { stderr, .. }) => Err(Error::Fetch {
                package: exact.to_owned(),
                stderr,
            }),
            result => result.map(drop),
        }
    }

    /// What `get` finds and fetches. The lists may be older than the mirror, which drops a version of a package as soon
    /// as it has the next: where one cannot be fetched, once more with new lists.
    ///
    /// # Errors
    /// As `get`.
    pub(crate) fn fetching<T>(&self, get: impl Fn() -> Result<T>) -> Result<T> {
        let error = match get() {
            Err(error @ Error::Fetch { .. }) => error,
            other => return other,
        };
        let _lock = self.cache.lock("apt")?;
        match self.update() {
            Ok(()) => get(),
            Err(_) => Err(error),
        }
    }

    fn renew(&self, list: &str) -> Result<()> {
        let file = self.sources_file();
        let same = std::fs::read_to_string(&file).is_ok_and(|old| old == list);
        let stamp = self.stamp();
        if same && age(&stamp).is_some_and(|age| age < LISTS_FRESH_FOR) {
            return Ok(());
        }
        if !same {
            // The lists are not those of these sources, nor will they be if this is interrupted.
            remove_file(&stamp)?;
            std::fs::write(&file, list).at("write", &file)?;
        }
        match self.update() {
            Err(error) if stamp.exists() => {
                eprintln!("images: {error}; the lists of an earlier day are used");
                Ok(())
            }
            result => result,
        }
    }

    fn update(&self) -> Result<()> {
        let _step = Step::start("fetch package lists");
        run(
            self.tool("apt-get").args(["update", "-q", "--error-on=any"]),
            "apt",
        )?;
        let stamp = self.stamp();
        std::fs::write(&stamp, "").at("write", &stamp)
    }

    /// Written when the lists have been fetched whole.
    fn stamp(&self) -> PathBuf {
        self.folder.join("updated")
    }

    /// An apt tool with this state; the machine's own configuration (proxies and the like) holds.
    fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let folder = self.folder.display();
        for option in [
            format!("Dir::State={folder}/state"),
            "Dir::State::status=/dev/null".to_owned(),
            format!("Dir::Cache={folder}/cache"),
            format!("Dir::Etc::SourceList={}", self.sources_file().display()),
            format!("Dir::Etc::SourceParts={folder}/empty"),
            format!("Dir::Etc::PreferencesParts={folder}/empty"),
            format!("Dir::Etc::Preferences={folder}/no-preferences"),
            // As root apt would drop to a user that cannot write here.
            "APT::Sandbox::User=".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

/// The machine's sources of its release and that release's backports, as a deb822 file for apt;
/// `None` where the machine has no source of its release.
#[must_use]
pub fn sources_with_backports() -> Option<String> {
    let codename = codename(Path::new("/etc/os-release")).ok()?;
    let machine = sources::machine_sources(Path::new("/etc/apt"));
    sources::for_release(&machine, &codename, Backports::Added)
}

/// The release's code name from os-release.
fn codename(os_release: &Path) -> Result<String> {
    let content = std::fs::read_to_string(os_release).at("read", os_release)?;
    content
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .ok_or_else(|| Error::NoSource("unknown".to_owned()))
}

fn remove_file(file: &Path) -> Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).at("remove", file),
        _ => Ok(()),
    }
}

fn age(file: &Path) -> Option<Duration> {
    SystemTime::now()
        .duration_since(file.metadata().ok()?.modified().ok()?)
        .ok()
}

fn only_file(folder: &Path) -> Result<PathBuf> {
    let mut entries = std::fs::read_dir(folder).at("list", folder)?.flatten();
    let first = entries
        .next()
        .ok_or_else(|| Error::NoPackage(text(folder).unwrap_or("?").to_owned()))?;
    Ok(first.path())
}

fn parse_show(shown: &str) -> Option<Package> {
    let paragraph = shown.split("\n\n").next()?;
    let field = |name: &str| {
        paragraph
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
            .map(str::to_owned)
    };
    let depends = field("Depends").unwrap_or_default();
    let first_word = |part: &str| part.split_whitespace().next().map(str::to_owned);
    Some(Package {
        name: field("Package")?,
        version: field("Version")?,
        depends: depends.split(',').filter_map(first_word).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_apt_cache_shows() {
        let shown = "Package: linux-image-amd64\nVersion: 6.12-1\nDepends: linux-image-6.12-amd64 (= 6.12-1), x | y\n\n\
                     Package: other\nVersion: 1\n";
        let package = parse_show(shown).unwrap();
        assert_eq!(package.name, "linux-image-amd64");
        assert_eq!(package.version, "6.12-1");
        assert_eq!(package.depends, ["linux-image-6.12-amd64", "x"]);
        assert_eq!(parse_show(""), None);
    }

    /// A mirror in a folder, with one package.
    struct Mirror(tempfile::TempDir);

    impl Mirror {
        fn new() -> Self {
            let mirror = Self(tempfile::tempdir().unwrap());
            std::fs::create_dir(mirror.path("mirror")).unwrap();
            mirror
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// Has this version of it, and no other any more.
        fn publish(&self, version: &str) {
            let tree = self.path(version);
            std::fs::create_dir_all(tree.join("DEBIAN")).unwrap();
            std::fs::write(tree.join("version"), version).unwrap();
            let control = format!(
                "Package: thing\nVersion: {version}\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
            );
            std::fs::write(tree.join("DEBIAN/control"), &control).unwrap();
            let archive = self.path("mirror").join(format!("thing_{version}.deb"));
            let mut build = Command::new("dpkg-deb");
            run(build.arg("--build").args([&tree, &archive]), "dpkg").unwrap();
            let sum = run(Command::new("sha256sum").arg(&archive), "coreutils").unwrap();
            let list = format!(
                "{control}Filename: ./thing_{version}.deb\nSize: {}\nSHA256: {}\n",
                archive.metadata().unwrap().len(),
                &String::from_utf8(sum).unwrap()[..64]
            );
            std::fs::write(self.path("mirror/Packages"), list).unwrap();
        }

        fn list(&self, folder: &str) -> String {
            let folder = self.path(folder);
            let folder = folder.display();
            format!("Types: deb\nURIs: copy:{folder}\nSuites: ./\nTrusted: yes\n")
        }

        fn apt(&self, list: &str) -> Result<Apt> {
            let cache = Cache::open(self.path("cache"))?;
            Apt::of(&cache, self.path("cache/apt/x"), "x".to_owned(), list)
        }
    }

    #[test]
    fn a_version_that_the_mirror_has_dropped_is_looked_for_again() {
        let mirror = Mirror::new();
        mirror.publish("1");
        let apt = mirror.apt(&mirror.list("mirror")).unwrap();
        assert_eq!(apt.find("thing", None).unwrap().version, "1");
        std::fs::remove_file(mirror.path("mirror/thing_1.deb")).unwrap();
        mirror.publish("2");
        let got = apt.fetching(|| apt.unpacked(&apt.find("thing", None)?)).unwrap();
        assert_eq!(std::fs::read(got.join("version")).unwrap(), b"2");
        std::fs::remove_dir_all(mirror.path("mirror")).unwrap();
        let gone = apt.fetching(|| {
            apt.unpacked(&Package {
                version: "3".into(),
                ..apt.find("thing", None)?
            })
        });
        assert!(matches!(gone, Err(Error::Fetch { .. })), "{gone:?}");
    }

    #[test]
    fn lists_that_were_not_fetched_are_none_the_next_time_either() {
        let mirror = Mirror::new();
        mirror.publish("1");
        mirror.apt(&mirror.list("mirror")).unwrap();
        // Other sources, which cannot be had at first.
        let other = mirror.list("other");
        assert!(mirror.apt(&other).is_err());
        assert!(mirror.apt(&other).is_err());
        std::fs::rename(mirror.path("mirror"), mirror.path("other")).unwrap();
        let apt = mirror.apt(&other).unwrap();
        assert_eq!(apt.find("thing", None).unwrap().version, "1");
        // Nor are old ones worse than none.
        std::fs::rename(mirror.path("other"), mirror.path("gone")).unwrap();
        let stamp = std::fs::File::open(apt.stamp()).unwrap();
        stamp.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let apt = mirror.apt(&other).unwrap();
        assert_eq!(apt.find("thing", None).unwrap().version, "1");
    }
}
