//! Builds every image into the person's cache and prints where each one is.

use images::apt::Apt;
use images::cache::Cache;
use images::debian_root::debian_root;
use images::initramfs;
use images::kernel::{Kernel, KernelChoice};
use std::error::Error;
use std::process::ExitCode;

/// What stands before the root's image, by which the README's tour finds it.
const DEBIAN_ROOT: &str = "Debian root ";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("images: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  cause: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn build() -> images::Result<()> {
    let cache = Cache::open_default()?;
    let apt = Apt::open(&cache)?;
    for choice in [KernelChoice::Default, KernelChoice::V6_1] {
        match Kernel::get(&cache, &apt, choice) {
            Ok(kernel) => {
                println!("kernel {} bzImage {}", kernel.release, kernel.bzimage.display());
                println!("kernel {} ELF     {}", kernel.release, kernel.elf.display());
            }
            Err(images::Error::NoPackage(name)) => println!("kernel {choice:?}: this release has no {name}"),
            Err(error) => return Err(error),
        }
    }
    println!("busybox {}", initramfs::busybox(&apt)?.display());
    println!("{DEBIAN_ROOT}{}", debian_root(&cache, &apt)?.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::DEBIAN_ROOT;

    #[test]
    fn the_readme_finds_the_roots_image() {
        let readme = include_str!("../../README.md");
        let command = format!("sed -n 's/^{DEBIAN_ROOT}//p' ");
        assert!(readme.contains(&command), "no {command}");
    }
}
