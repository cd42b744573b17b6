// {{ name }}: text -> label, written from manifest.json. Not compiled where it was written; check it with selftest.json.
// Gradle: what Model.kt names; and for tokenizer.json, both of one version,
// implementation("ai.djl.huggingface:tokenizers:0.33.0") and runtimeOnly("ai.djl.android:tokenizer-native:0.33.0").
import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer
import android.content.Context
import kotlin.math.exp

class Classifier(context: Context) : AutoCloseable {
    private val labels = listOf({{ end.labels | map("kotlin") | join(", ") }})
    private val prefix = longArrayOf({{ rule.prefix_ids | join(", ") }})
    private val suffix = longArrayOf({{ rule.suffix_ids | join(", ") }})
    private val maxLength = {{ rule.max_length }}
    private val model = Model(context)
    private val tokenizer = context.assets.open("{{ rule.tokenizer }}").use { HuggingFaceTokenizer.newInstance(it, emptyMap()) }

    /** The ids of a text: special ones before and after as many of its own as there is room for. */
    fun encode(text: String): LongArray {
        val own = tokenizer.encode(text, false, false).ids
        return prefix + own.take(maxLength - prefix.size - suffix.size) + suffix
    }

    /** Label to probability, likeliest first. */
    fun classify(text: String): List<Pair<String, Double>> {
        val ids = encode(text)
        val scores = model.run(mapOf("input_ids" to ids, "attention_mask" to LongArray(ids.size) { 1 }), "{{ end.output }}")
        val powers = scores.map { exp((it - scores.max()).toDouble()) }
        return labels.zip(powers.map { it / powers.sum() }).sortedByDescending { it.second }
    }

    override fun close() {
        model.close()
        tokenizer.close()
    }
}
