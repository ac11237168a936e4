//! Layers point one way: between packages, and between the modules of one.

use std::path::Path;

use super::Finding;
use super::code::is_word;

/// The layers of a package, lowest first. Modules of one layer that stand in
/// one group may use each other; groups of one layer may not.
struct Package {
    source: &'static str,
    layers: &'static [&'static [&'static [&'static str]]],
    /// Modules that stand beside the layers, and all that they may use.
    aside: &'static [(&'static str, &'static [&'static str])],
}

const PACKAGES: [Package; 2] = [
    Package {
        source: "engine/src",
        layers: &[
            &[&["id", "units", "error", "env", "settings"]],
            &[&["io"], &["chunk"]],
            &[&["pack"]],
            &[&["index"], &["tree"]],
            &[&["depot"]],
            &[&["catalog"]],
            &[&["lease"], &["ledger"]],
            &[&["ingest"], &["read"], &["account"]],
            &[&["check"], &["gc"]],
            &[&["fuzzing"]],
            &[&["store"]],
        ],
        aside: &[],
    },
    Package {
        source: "runtime/src",
        layers: &[
            &[&["sys", "protocol", "pieces", "pages"]],
            &[&["memory"], &["jail"]],
            &[&["vcpu"], &["devices"], &["fault"]],
            &[&["vm"]],
            &[&["fuzzing"]],
        ],
        aside: &[("host", &["sys", "protocol", "pieces"])],
    },
];

/// Folders, and the packages that nothing in them may know.
const STRANGERS: [(&str, &[&str]); 4] = [
    ("engine", &["coppice_runtime", "coppice_agent", "kvm_ioctls", "kvm_bindings"]),
    ("runtime", &["coppice_agent", "rocksdb"]),
    ("tools/agent", &["coppice_engine", "coppice_runtime"]),
    ("tools/xtask", &["coppice_engine", "coppice_runtime"]),
];

/// Checks a Rust file of which only code is left.
pub(super) fn check(path: &Path, code: &str) -> Vec<Finding> {
    let mut found = strangers(path, code);
    for package in &PACKAGES {
        if let Ok(inside) = path.strip_prefix(package.source) {
            found.extend(check_module(package, path, inside, code));
        }
    }
    found
}

fn strangers(path: &Path, code: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    for (folder, packages) in STRANGERS {
        if !path.starts_with(folder) {
            continue;
        }
        for package in packages {
            for at in words(code, package) {
                let what = format!("{folder} must not know {package}");
                found.push(Finding::new(path, line_of(code, at), what));
            }
        }
    }
    found
}

fn check_module(package: &Package, path: &Path, inside: &Path, code: &str) -> Vec<Finding> {
    let modules = modules(inside);
    let Some(module) = modules.first() else {
        return Vec::new();
    };
    // Tests stand above all layers.
    if modules.iter().any(|module| module == "tests") {
        return Vec::new();
    }
    let mut found = Vec::new();
    if package.place(module).is_none() && package.beside(module).is_none() {
        let what = format!("the module {module} has no place in the layers of {}", package.source);
        found.push(Finding::new(path, 1, what));
        return found;
    }
    for (at, used) in uses(code) {
        if let Err(what) = package.allows(module, &used) {
            found.push(Finding::new(path, line_of(code, at), what));
        }
    }
    for at in climbs(code, modules.len()) {
        let what = "reaches the package's root by `super`: write `crate::`, so that layers show";
        found.push(Finding::new(path, line_of(code, at), what));
    }
    found
}

impl Package {
    /// The layer and the group of a module.
    fn place(&self, module: &str) -> Option<(usize, usize)> {
        self.layers.iter().enumerate().find_map(|(layer, groups)| {
            let group = groups.iter().position(|group| group.contains(&module))?;
            Some((layer, group))
        })
    }

    fn beside(&self, module: &str) -> Option<&'static [&'static str]> {
        self.aside.iter().find(|(name, _)| *name == module).map(|(_, may)| *may)
    }

    fn allows(&self, module: &str, used: &str) -> Result<(), String> {
        if module == used {
            return Ok(());
        }
        if let Some(may) = self.beside(module) {
            let list = may.join(", ");
            let refusal = || format!("{module} may use {list} only, not {used}");
            return if may.contains(&used) { Ok(()) } else { Err(refusal()) };
        }
        let Some(target) = self.place(used) else {
            return Err(format!(
                "`crate::{used}` is no module below {module}: name the module that has it"
            ));
        };
        let Some(own) = self.place(module) else { return Ok(()) };
        if target.0 < own.0 || target == own {
            return Ok(());
        }
        Err(format!("{module} must not use {used}, which is not below it"))
    }
}

/// The modules on the way to a file inside a package's source folder; none
/// for the package's own root.
fn modules(inside: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        inside.with_extension("").iter().map(|name| name.to_string_lossy().into_owned()).collect();
    if names.last().is_some_and(|name| name == "mod") {
        names.pop();
    }
    if names == ["lib"] || names == ["main"] {
        names.clear();
    }
    names
}

/// Where `crate::NAME` stands, and each NAME of `crate::{NAME, NAME::x}`.
fn uses(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for at in words(code, "crate") {
        let after = &code[at + "crate".len()..];
        let Some(rest) = after.strip_prefix("::") else { continue };
        let rest = rest.trim_start();
        if let Some(group) = rest.strip_prefix('{') {
            found.extend(group_names(group).into_iter().map(|name| (at, name)));
        } else {
            found.push((at, first_word(rest)));
        }
    }
    found
}

/// The first name of each path in `a, b::{c, d}, e}`.
fn group_names(group: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut depth = 0usize;
    let mut start = 0;
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                names.push(first_word(group[start..at].trim_start()));
                start = at + 1;
                if character == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// Where a path of `super`s climbs out of a module that is `depth` deep. A
/// module inside the file, such as its tests, is one deeper.
fn climbs(code: &str, depth: usize) -> Vec<usize> {
    let mut found = Vec::new();
    let mut past = 0;
    for at in words(code, "super") {
        if at < past {
            continue;
        }
        let mut supers = 0;
        let mut rest = &code[at..];
        while let Some(next) = rest.strip_prefix("super::") {
            supers += 1;
            rest = next;
        }
        past = code.len() - rest.len();
        let inner = usize::from(words(&code[..at], "mod").any(|word| opens_module(&code[word..])));
        if supers >= depth + inner {
            found.push(at);
        }
    }
    found
}

/// Whether `mod NAME {` stands here.
fn opens_module(code: &str) -> bool {
    let name = code["mod".len()..].trim_start();
    let word = first_word(name);
    !word.is_empty() && name[word.len()..].trim_start().starts_with('{')
}

/// Where a whole word stands.
fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        let bytes = code.as_bytes();
        let before = at.checked_sub(1).map(|index| bytes[index]);
        let after = bytes.get(at + word.len()).copied();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

fn first_word(text: &str) -> String {
    text.bytes().take_while(|byte| is_word(*byte)).map(char::from).collect()
}

fn line_of(code: &str, at: usize) -> usize {
    code[..at].matches('\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, code: &str) -> Vec<String> {
        check(Path::new(path), code).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn lower_layers_and_the_own_one_may_be_used() {
        let good = [
            ("engine/src/pack/write.rs", "use crate::chunk::Page;\nuse super::frame::Frame;"),
            ("engine/src/id.rs", "use crate::units::PAGE_LEN;\nmod tests { use super::*; }"),
            ("engine/src/store/mod.rs", "use crate::{check::Report, read::{self, X}};"),
            ("runtime/src/fault/tests/fork.rs", "use crate::host::PagerHandle;"),
            ("engine/src/lib.rs", "pub use crate::store::Store;"),
            ("runtime/src/host/vmm.rs", "use crate::sys::channel::Channel;"),
            ("runtime/src/devices/virtio/block/disk.rs", "use super::super::super::gate::Gate;"),
            ("tools/coppice/src/main.rs", "use crate::anything::at_all;"),
        ];
        for (path, code) in good {
            assert_eq!(found(path, code), Vec::<String>::new(), "{path}");
        }
    }

    #[test]
    fn upper_and_neighbouring_layers_may_not() {
        let bad = [
            ("engine/src/pack/write.rs", "use crate::store::Store;"),
            ("engine/src/io/ring.rs", "use crate::chunk::Page;"),
            ("engine/src/index/mod.rs", "use crate::{id::PackId, tree::Node};"),
            ("engine/src/pack/write.rs", "fn f() { crate::catalog::Catalog::new() }"),
            ("engine/src/pack/write.rs", "use crate::Store;"),
            ("engine/src/novel.rs", ""),
            ("engine/src/pack/mod.rs", "use super::store::Store;"),
            ("engine/src/pack/write.rs", "use super::super::store::Store;"),
            ("runtime/src/host/vmm.rs", "use crate::memory::Ram;"),
            ("runtime/src/memory/ram.rs", "use crate::vm::Machine;"),
            ("runtime/src/vcpu/mod.rs", "use crate::devices::Gate;"),
        ];
        for (path, code) in bad {
            assert_eq!(found(path, code).len(), 1, "{path}: {code}");
        }
    }

    #[test]
    fn the_engine_does_not_know_the_runtime() {
        assert_eq!(found("engine/tests/store/main.rs", "\nuse coppice_runtime::X;").len(), 1);
        assert_eq!(found("tools/agent/src/main.rs", "use coppice_engine::X;").len(), 1);
        assert!(found("engine/src/lib.rs", "let my_coppice_runtime = 1;").is_empty());
    }

    #[test]
    fn a_finding_names_its_line() {
        let found = found("engine/src/pack/write.rs", "\n\nuse crate::store::Store;");
        assert!(found[0].starts_with("engine/src/pack/write.rs:3: "), "{found:?}");
    }
}
