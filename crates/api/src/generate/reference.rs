//! The reference page: every field of every kind, read from the generated schemas.

use std::fmt::Write;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray,
};

/// Types of Kubernetes itself are named, not unfolded.
const FOREIGN: &[(&str, &str)] = &[("conditions", "[]Condition"), ("resources", "ResourceRequirements")];

pub(crate) fn page(definitions: &[CustomResourceDefinition]) -> String {
    let mut page = String::from(
        "# Reference of the custom resources\n\nGenerated from `crates/api` by `make generate`. \
         The spec belongs to the user; the status answers.\n",
    );
    for definition in definitions {
        let names = &definition.spec.names;
        let short = names.short_names.clone().unwrap_or_default().join(", ");
        let version = &definition.spec.versions[0];
        let schema = version.schema.as_ref().and_then(|schema| schema.open_api_v3_schema.as_ref()).expect("a schema");
        let properties = schema.properties.as_ref().expect("properties");
        let _ = write!(
            page,
            "\n## {}\n\n`{}/{}`, short name `{short}`, category `aether`.\n",
            names.kind, definition.spec.group, version.name
        );
        for part in ["spec", "status"] {
            let Some(part_schema) = properties.get(part) else { continue };
            let _ = write!(page, "\n### {} {part}\n\n", names.kind);
            if let Some(text) = &part_schema.description {
                let _ = write!(page, "{}\n\n", one_line(text));
            }
            page.push_str("| field | type | meaning |\n|---|---|---|\n");
            rows(&mut page, "", part_schema);
            rules(&mut page, part_schema);
        }
    }
    page
}

fn rows(page: &mut String, prefix: &str, schema: &JSONSchemaProps) {
    let required = schema.required.clone().unwrap_or_default();
    for (name, field) in schema.properties.iter().flatten() {
        let path = format!("{prefix}{name}");
        let foreign = FOREIGN.iter().find(|(field_name, _)| field_name == name).map(|(_, type_name)| *type_name);
        let kind = foreign.map_or_else(|| type_of(field), str::to_owned);
        let need = if required.contains(name) { " (required)" } else { "" };
        let _ = writeln!(page, "| `{path}` | {kind}{need} | {} |", one_line(&meaning(field)));
        if foreign.is_none() {
            match item(field) {
                Some(inner) => rows(page, &format!("{path}[]."), inner),
                None => rows(page, &format!("{path}."), field),
            }
        }
    }
}

fn rules(page: &mut String, schema: &JSONSchemaProps) {
    let rules = schema.x_kubernetes_validations.as_deref().unwrap_or_default();
    if !rules.is_empty() {
        page.push_str("\nRules:\n\n");
    }
    for rule in rules {
        let _ = writeln!(page, "- {}", rule.message.as_deref().unwrap_or(&rule.rule));
    }
}

fn item(schema: &JSONSchemaProps) -> Option<&JSONSchemaProps> {
    match schema.items.as_ref()? {
        JSONSchemaPropsOrArray::Schema(inner) => Some(inner),
        JSONSchemaPropsOrArray::Schemas(_) => None,
    }
}

fn type_of(schema: &JSONSchemaProps) -> String {
    if let Some(inner) = item(schema) {
        return format!("[]{}", type_of(inner));
    }
    let name = match (schema.type_.as_deref(), schema.format.as_deref()) {
        (Some("string"), Some("date-time")) => "time",
        (Some(name), _) => name,
        (None, _) => "any",
    };
    name.to_owned()
}

/// The description, the values of an enumeration and the default.
fn meaning(schema: &JSONSchemaProps) -> String {
    let mut text = schema.description.clone().unwrap_or_default();
    let values: Vec<&str> = schema.enum_.iter().flatten().filter_map(|value| value.0.as_str()).collect();
    if !values.is_empty() {
        let _ = write!(text, " One of: `{}`.", values.join("`, `"));
    }
    if let Some(default) = schema.default.as_ref().filter(|default| !default.0.is_null()) {
        let _ = write!(text, " Default: `{}`.", default.0);
    }
    text
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}
