//! What can go wrong while images are built.

use std::path::PathBuf;

/// What whoever cannot make user namespaces is told.
pub const MORE_NAMESPACES: &str = "it takes user namespaces; where this user can make none, as root, run: sysctl \
     user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1; where AppArmor restricts them: sysctl \
     kernel.apparmor_restrict_unprivileged_userns=0";

/// Why an image could not be built. Each message says what failed; the source says why, and
/// where something can be done about it the message ends with what.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read, written or made.
    #[error("cannot {verb} {}", path.display())]
    File {
        /// What was tried, such as "read".
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A program that this needs is not installed.
    #[error("cannot run '{program}': install the Debian package '{package}'")]
    Missing {
        /// The program.
        program: String,
        /// The package that has it.
        package: &'static str,
        /// Why it could not be started.
        #[source]
        source: std::io::Error,
    },
    /// A program ended with an error.
    #[error("{command} failed ({status}): {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// A package that the lists name cannot be fetched.
    #[error("cannot fetch {package}: {stderr}")]
    Fetch {
        /// Its name and version.
        package: String,
        /// The end of what apt wrote to standard error.
        stderr: String,
    },
    /// No package of this name in any configured suite.
    #[error("no package '{0}' in the configured apt sources: is the suite listed, is the network up?")]
    NoPackage(String),
    /// The user has no home, and nothing says where else.
    #[error(
        "no place for the cache: this user has no home; set BULKHEAD_CACHE or XDG_CACHE_HOME to a folder"
    )]
    NoCache,
    /// The user cannot stand in for root.
    #[error(
        "mmdebstrap: {0}: it takes subordinate ids; for a user without any, as root, run: \
         usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER"
    )]
    NoSubordinateIds(String),
    /// The user may make no user namespace.
    #[error("mmdebstrap: {0}: {MORE_NAMESPACES}")]
    NoUserNamespaces(String),
    /// The machine has no apt source this can use.
    #[error("no Debian source for release '{0}' in /etc/apt/sources.list or sources.list.d")]
    NoSource(String),
    /// A file does not have the format that it should have.
    #[error("{}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A kernel module, or one that it needs, is neither a file nor built in.
    #[error("kernel {release} has no module '{module}'")]
    NoModule {
        /// The module's name.
        module: String,
        /// The kernel's release.
        release: String,
    },
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Names the file in an I/O error.
pub(crate) trait At<T> {
    /// Wraps an error with what was tried on which file.
    fn at(self, verb: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, verb: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|source| Error::File {
            verb,
            path: path.into(),
            source,
        })
    }
}
